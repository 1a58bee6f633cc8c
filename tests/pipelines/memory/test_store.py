"""A store on a disk and on S3: complete or absent documents, whose memories they are, and what damage looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base.errors import DamagedError, UserError
from bmojo.long_term import remember
from pipelines.memory.store import EIDETIC, RECORD, STATE, DocumentStore
from pipelines.memory.tensors import eidetic_of_all, encoded, remembered
from pipelines.storage import Storage, open_storage
from tests.pipelines.memory.stores import identity, store_of
from tests.pipelines.stages.trained_run import tiny_model

DOCUMENTS = {"first.txt": [3, 1, 4, 1, 5] * 20, "second.txt": [2, 7, 1, 8], "third.txt": [9]}


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        found: Storage = request.getfixturevalue("s3_storage")
        return found
    return open_storage(tmp_path / "store")


def filled(storage: Storage) -> DocumentStore:
    store = store_of(storage)
    for name, tokens in DOCUMENTS.items():
        store.add(store.id_of(tokens), name, len(tokens), encoded(remember(tiny_model(), tokens)))
    return store


def file_of(storage: Storage, name: str) -> str:
    """The path of a file of the first document."""
    return f"documents/{DocumentStore.id_of(DOCUMENTS['first.txt'])}/{name}"


def test_documents_come_back_as_they_were_remembered(storage: Storage) -> None:
    filled(storage)
    store, model = DocumentStore.open(storage), tiny_model()
    records = store.records()
    assert [(one.name, one.num_tokens) for one in records] == [(name, len(ids)) for name, ids in DOCUMENTS.items()]
    for record, (tokens, eidetic) in zip(
        records, zip(DOCUMENTS.values(), eidetic_of_all(store, records), strict=True), strict=True
    ):
        found, expected = remembered(store, record, model.init_state(1)), remember(model, tokens)
        assert found.state.tensors().keys() == expected.state.tensors().keys()
        for path, x in expected.state.tensors().items():
            assert torch.equal(found.state.tensors()[path], x)
        assert found.log_decay.keys() == expected.log_decay.keys() == {0, 1, 2}
        for layer, x in expected.log_decay.items():
            assert torch.equal(found.log_decay[layer], x)
        for layer, kept in expected.eidetic.items():
            assert all(map(torch.equal, kept, found.eidetic[layer]))
            assert all(map(torch.equal, kept, eidetic[layer]))
    assert not store.verify()


def test_forgotten_documents_are_gone(storage: Storage) -> None:
    store = filled(storage)
    (second,) = store.named(["second.txt"])
    store.remove(second)
    assert [record.name for record in store.records()] == ["first.txt", "third.txt"]
    assert store.find(second.id) is None
    assert not storage.exists(f"documents/{second.id}")
    with pytest.raises(UserError, match=r"no document 'second.txt' in .*\. bmojo store list"):
        store.named(["second.txt"])
    with pytest.raises(UserError, match=r"Did you mean 'first.txt'\?"):
        store.named(["frst.txt"])
    (third,) = store.named([store.id_of([9])[:10]])
    assert third.name == "third.txt"


@pytest.mark.parametrize("file", [EIDETIC, STATE, RECORD])
@pytest.mark.parametrize("damage", ["cut", "changed", "lost"])
def test_damage_is_named_and_can_be_removed(tmp_path: Path, file: str, damage: str) -> None:
    storage = open_storage(tmp_path / "store")
    store = filled(storage)
    path = file_of(storage, file)
    content = storage.read_bytes(path)
    middle = len(content) // 2
    if damage == "lost":
        storage.delete(path)
    else:
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        storage.write_bytes_atomic(path, content[:middle] if damage == "cut" else changed)
    problems = store.verify()
    assert [problem.id for problem in problems] == [store.id_of(DOCUMENTS["first.txt"])]
    if file == RECORD and damage == "lost":  # as if it had never been completed
        assert [record.name for record in store.records()] == ["second.txt", "third.txt"]
    elif file == RECORD:
        with pytest.raises(DamagedError, match=f"{path} is damaged"):
            store.records()
    else:
        record = store.records()[0]
        with pytest.raises(DamagedError, match=rf"document 'first.txt': .*{path} is damaged: .*store verify"):
            remembered(store, record, tiny_model().init_state(1))
    store.remove_damaged(problems)
    assert [record.name for record in store.records()] == ["second.txt", "third.txt"]
    assert not store.verify()


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    filled(storage)
    store_of(storage)  # the same weights, built once more
    other = tiny_model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-6
    with pytest.raises(UserError, match=r"holds memories of model tiny \(bmojo,mamba2,bmojo_f, .*: the weights differ"):
        store_of(storage, other)
    stranger = identity(tiny_model()).model_copy(update={"digest": "0" * 64, "tokenizer_sha256": "1" * 64})
    with pytest.raises(UserError, match="the tokenizer differs"):
        DocumentStore.create(storage, stranger)


def test_there_is_no_store_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no store of documents at .*: it has no store.json"):
        DocumentStore.open(open_storage(tmp_path))


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    store = store_of(storage)
    storage.write_json_atomic("store.json", {**store.manifest.model_dump(), "format": 2})
    with pytest.raises(UserError, match="format 2; this version of bmojo reads 1"):
        DocumentStore.open(storage)
    storage.write_json_atomic("store.json", {**store.manifest.model_dump(), "more": 1})
    with pytest.raises(DamagedError, match="another version of this program"):
        DocumentStore.open(storage)
