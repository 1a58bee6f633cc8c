"""States on disk: complete or absent, the model's own, by ids that are no paths."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from base.errors import DamagedError
from pipelines.serving.context import Context, Reading, model_digest
from pipelines.serving.states import NoSuchStateError, StateError, StateExistsError, StateStore, check_id
from tests.pipelines.stages.trained_run import tiny_model
from tests.pipelines.waiting import wait_until

PATTERN = "bmojo,mamba2,attention,gated_deltanet"


def read(tokens: list[int], pattern: str = PATTERN) -> Context:
    reading = Reading(tiny_model(pattern), None, tokens, piece_tokens=64)
    while not reading.is_done:
        reading.advance()
    assert reading.context is not None
    return reading.context


def store_in(folder: Path, digest: str = "d" * 64, pattern: str = PATTERN) -> StateStore:
    return StateStore(folder, "run/train", digest, tiny_model(pattern).init_state(1))


@pytest.fixture(scope="module")
def context() -> Context:
    return read(list(range(3, 60)))


def test_a_state_comes_back_to_the_bit(tmp_path: Path, context: Context) -> None:
    facts = store_in(tmp_path / "new" / "folder").save("doc-1", context)
    again = store_in(tmp_path / "new" / "folder").load("doc-1")
    assert torch.equal(again.logits_v, context.logits_v)
    for path, x in context.state.tensors().items():
        assert torch.equal(again.state.tensors()[path], x), path
    assert (facts.num_tokens, facts.id, facts.model) == (57, "doc-1", "run/train")
    assert store_in(tmp_path / "new" / "folder").all() == [facts]


def test_states_never_change(tmp_path: Path, context: Context) -> None:
    store = store_in(tmp_path)
    store.save("a", context)
    with pytest.raises(StateExistsError, match="'a' already, and states do not change"):
        store.check_free("a")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(StateExistsError):
        store.save("a", read([1, 2]))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    store.delete("a")
    with pytest.raises(NoSuchStateError):
        store.delete("a")
    assert os.listdir(tmp_path) == []


def test_another_model_refuses_it(tmp_path: Path, context: Context) -> None:
    store_in(tmp_path).save("a", context)
    with pytest.raises(StateError, match=r"was written by model run/train \(digest dddddddddddd\); this is"):
        store_in(tmp_path, "e" * 64).load("a")
    assert [facts.id for facts in store_in(tmp_path, "e" * 64).all()] == ["a"]


def test_the_digest_is_of_weights_config_precision_and_tokenizer() -> None:
    first, second = tiny_model(), tiny_model()
    second.init_weights(1)
    digests = {
        model_digest(first, "t"), model_digest(second, "t"), model_digest(first, "u"),
        model_digest(tiny_model("swa"), "t"), model_digest(tiny_model().bfloat16(), "t"),
    }  # fmt: skip
    assert len(digests) == 5
    assert model_digest(tiny_model(), "t") == model_digest(first, "t")


@pytest.mark.parametrize("place", [8, 400, -1, -9000])
def test_damage_is_found(tmp_path: Path, context: Context, place: int) -> None:
    store = store_in(tmp_path)
    store.save("a", context)
    file = tmp_path / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="'a' is damaged"):
        store.load("a")
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedError):
        store.load("a")


@given(
    st.text(max_size=70) | st.sampled_from(["../a", "a/b", "a\\b", ".", "..", "", "a\0", "-a", "a\n", "é", ".a.tmp"])
)
def test_ids_are_names_of_files_in_the_folder(state_id: str) -> None:
    try:
        check_id(state_id)
    except StateError:
        return
    file = store_in(Path("/states"))._file(state_id)
    assert file.parent == Path("/states")
    assert Path(os.path.normpath(file)) == file
    assert not file.name.startswith(".")


def test_only_one_of_those_who_save_an_id_at_once_does(tmp_path: Path, context: Context) -> None:
    results: list[object] = []

    def save() -> None:
        try:
            results.append(store_in(tmp_path).save("a", context))
        except StateExistsError as error:
            results.append(error)

    threads = [threading.Thread(target=save) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(result, StateExistsError) for result in results) == 5
    assert store_in(tmp_path).load("a").num_tokens == 57
    assert os.listdir(tmp_path) == ["a.safetensors"]


WRITER = """
import sys
from pathlib import Path
from tests.pipelines.serving.test_states import read, store_in
store, context = store_in(Path(sys.argv[1])), read(list(range(3, 60)))
for n in range(100000):
    store.save(f"s{n}", context)
"""


@pytest.mark.ci
def test_a_killed_writer_leaves_whole_states_only(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    wait_until(lambda: len(list(tmp_path.glob("*.safetensors"))) > 20)
    writer.kill()
    writer.wait()
    store = store_in(tmp_path)
    found = store.all()
    assert len(found) == len(list(tmp_path.glob("*.safetensors")))
    for facts in found[-3:]:
        assert store.load(facts.id).num_tokens == 57


def test_what_was_half_written_is_removed_once_it_is_old(tmp_path: Path, context: Context) -> None:
    old, new = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    store_in(tmp_path).remove_unfinished()
    assert not old.exists()
    assert new.exists()
    assert store_in(tmp_path).all() == []
