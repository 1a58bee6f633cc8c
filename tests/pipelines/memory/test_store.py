"""A store on a disk and on S3: complete or absent documents, whose memories they are, and what damage looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import DamagedError, UserError
from bmojo.long_term import remember
from pipelines.memory.asking import StoredMemory
from pipelines.memory.store import EIDETIC, STATE, DocumentRecord, DocumentStore
from pipelines.memory.tensors import eidetic_of_all, encoded, remembered
from pipelines.storage import Storage, open_storage
from tests.pipelines.memory.stores import identity, make_old, store_of
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
        add(store, name, tokens)
    return store


def add(store: DocumentStore, name: str, tokens: list[int], part: int | None = None) -> DocumentRecord:
    contents = encoded(remember(tiny_model(), tokens))
    return store.add(store.id_of(tokens), name, len(tokens), contents, "float32", part)


def named(store: DocumentStore, *names: str) -> list[DocumentRecord]:
    return store.named(names, store.records())


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
    (second,) = named(store, "second.txt")
    store.remove(second)
    assert [record.name for record in store.records()] == ["first.txt", "third.txt"]
    assert store.find(second.id) is None
    assert not storage.exists(f"tensors/{second.folder}")
    with pytest.raises(UserError, match=r"no document 'second.txt' in .*\. bmojo store list"):
        named(store, "second.txt")
    with pytest.raises(UserError, match=r"Did you mean 'first.txt'\?"):
        named(store, "frst.txt")
    (third,) = named(store, store.id_of([9])[:10])
    assert third.name == "third.txt"


def test_a_file_means_all_its_parts_and_few_characters_mean_nothing(tmp_path: Path) -> None:
    store = store_of(open_storage(tmp_path / "store"))
    first, second = add(store, "book.txt", [1, 2], part=1), add(store, "book.txt", [3, 4], part=2)
    assert named(store, "book.txt", second.id) == [first, second]
    assert named(store, "book.txt#2") == [second]
    store.remove(first)
    for few in ("", second.id[:3]):
        with pytest.raises(UserError, match="at least 4 characters of an id"):
            named(store, few)
    assert named(store, second.id[:4]) == [second]


def test_an_id_is_the_digest_of_all_tokens_as_json() -> None:
    """Hashed block by block; a list and an array are the same document."""
    tokens = list(range(70_000)) * 2
    expected = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    assert DocumentStore.id_of(tokens) == DocumentStore.id_of(np.array(tokens, np.uint32)) == expected


@pytest.mark.parametrize("file", [EIDETIC, STATE, "record"])
@pytest.mark.parametrize("damage", ["cut", "changed", "lost"])
def test_damage_is_named_and_can_be_removed(tmp_path: Path, file: str, damage: str) -> None:
    storage = open_storage(tmp_path / "store")
    store = filled(storage)
    record = store.records()[0]
    path = f"documents/{record.id}.json" if file == "record" else f"tensors/{record.folder}/{file}"
    content = storage.read_bytes(path)
    middle = len(content) // 2
    if damage == "lost":
        storage.delete(path)
    else:
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        storage.write_bytes_atomic(path, content[:middle] if damage == "cut" else changed)
    make_old(tmp_path / "store")
    problems = store.verify()
    assert [problem.id for problem in problems] == [record.id]
    if file != "record":
        with pytest.raises(DamagedError, match=rf"document 'first.txt': .*{path} is damaged: .*[^.]\. Remove it"):
            remembered(store, record, tiny_model().init_state(1))
    elif damage != "lost":  # else it is as if it had never been completed
        assert [one.name for one in store.scan()[0]] == ["second.txt", "third.txt"]
        with pytest.raises(DamagedError, match=rf"{path} is damaged: .*[^.]\. Remove it with bmojo store verify"):
            store.records()
    assert store.remove_damaged(problems) == 1
    assert [one.name for one in store.records()] == ["second.txt", "third.txt"]
    assert not store.verify()
    assert not storage.exists(f"tensors/{record.folder}")


def at_the_record(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Before the next record of a document is written, do something else once."""
    write = Storage.write_json_atomic

    def acting(storage: Storage, path: str, value: dict[str, object]) -> None:
        if path.startswith("documents/"):
            monkeypatch.setattr(Storage, "write_json_atomic", write)
            act()
        write(storage, path, value)

    monkeypatch.setattr(Storage, "write_json_atomic", acting)


def test_what_is_being_written_is_neither_reported_nor_removed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = filled(storage), DocumentStore.open(storage)
    found = []
    at_the_record(monkeypatch, lambda: found.extend([other.verify(), other.remove_damaged(other.verify())]))
    record = add(store, "fourth.txt", [5, 5])
    assert found == [[], 0]
    assert store.read(record, STATE)
    assert not store.verify()


def test_what_a_stopped_writer_left_is_found_and_removed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(storage)

    def stop() -> None:
        raise KeyboardInterrupt

    at_the_record(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        add(store, "fourth.txt", [5, 5])
    assert not store.verify()
    monkeypatch.setattr("pipelines.memory.store._UNFINISHED_S", -60)  # an hour later, and some for the clocks
    problems = store.verify()
    assert [problem.id for problem in problems] == [store.id_of([5, 5])]
    assert store.remove_damaged(problems) == 1
    assert len(storage.list("tensors")) == len(store.records()) == 3


def test_a_document_that_was_forgotten_meanwhile_is_not_renamed(tmp_path: Path) -> None:
    store = filled(open_storage(tmp_path / "store"))
    first = store.records()[0]
    store.remove(first)
    store.rename(first, "other.txt", None)
    assert store.find(first.id) is None


def test_what_is_forgotten_during_a_check_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(open_storage(tmp_path / "store"))
    read = DocumentStore.read

    def forgotten(store: DocumentStore, record: DocumentRecord, file: str) -> bytes:
        store.remove(record)
        return read(store, record, file)

    monkeypatch.setattr(DocumentStore, "read", forgotten)
    assert not store.verify()
    assert not store.records()


def test_of_two_writers_of_a_document_one_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes differ, as a GPU's and a CPU's do; the second writes all of it before the first's record."""
    storage = open_storage(tmp_path / "store")
    store, other, document_id = store_of(storage), store_of(storage), DocumentStore.id_of([1])
    theirs = {EIDETIC: b"theirs", STATE: b"theirs too"}
    at_the_record(monkeypatch, lambda: other.add(document_id, "b.txt", 1, theirs, "bfloat16"))
    store.add(document_id, "a.txt", 1, {EIDETIC: b"ours", STATE: b"ours too"}, "float32")
    (record,) = store.records()
    assert (record.name, store.read(record, EIDETIC), store.read(record, STATE)) == ("a.txt", b"ours", b"ours too")
    assert not store.verify()
    make_old(tmp_path / "store")
    (left,) = store.verify()
    assert "is left over: whatever wrote it was stopped" in left.problem
    assert store.remove_damaged([left]) == 1
    assert store.records() == [record]
    assert storage.list("tensors") == [record.folder]


def test_what_was_damaged_and_is_whole_again_is_not_removed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    store = filled(storage)
    path = f"documents/{store.records()[0].id}.json"
    content = storage.read_bytes(path)
    storage.write_bytes_atomic(path, b"{")
    problems = store.verify()
    storage.write_bytes_atomic(path, content)
    assert store.remove_damaged(problems) == 0
    assert len(store.records()) == 3


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


def test_documents_outlive_a_lost_manifest_but_are_never_another_models(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    records = filled(storage).records()
    storage.delete("store.json")
    other = tiny_model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-6
    with pytest.raises(UserError, match=r"has no store.json, but documents that another model .* as '.*\.txt'"):
        store_of(storage, other)
    assert store_of(storage).records() == records
    strange = records[0].model_copy(update={"model": "0" * 64})
    storage.write_json_atomic(f"documents/{strange.id}.json", strange.model_dump(mode="json"))
    with pytest.raises(DamagedError, match="another model wrote it"):
        store_of(storage).records()


def test_only_the_stores_model_reads_it(tmp_path: Path) -> None:
    store, other = filled(open_storage(tmp_path / "store")), tiny_model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-6
    with pytest.raises(UserError, match="the weights differ"):
        StoredMemory(store, other, identity(other))
    assert StoredMemory(store, tiny_model(), identity(tiny_model())).records == store.records()


def test_there_is_no_store_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no store of documents at .*: it has no store.json"):
        DocumentStore.open(open_storage(tmp_path))


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    store = store_of(storage)
    manifest = store.manifest.model_dump(mode="json")
    for number in (1, 3):
        storage.write_json_atomic("store.json", {**manifest, "format": number})
        with pytest.raises(UserError, match=f"format {number}; this version of bmojo reads 2. .* in a new store"):
            DocumentStore.open(storage)
    storage.write_json_atomic("store.json", {**manifest, "more": 1})
    with pytest.raises(DamagedError, match="another version of this program"):
        DocumentStore.open(storage)
