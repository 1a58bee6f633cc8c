"""Files on their way into a store: parts, equal content, a kill at any write, what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.memory.remembering import files_of, remember_files
from pipelines.memory.store import DocumentStore
from pipelines.storage import open_storage
from tests.pipelines.memory.stores import TOKENIZER, store_of, text_files
from tests.pipelines.stages.trained_run import tiny_model

ROOT = Path(__file__).resolve().parents[3]

KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.memory.remembering import remember_files
from pipelines.storage import open_storage
from pipelines.storage.storage import Storage
from tests.pipelines.memory.stores import TOKENIZER, store_of, text_files
from tests.pipelines.stages.trained_run import tiny_model

folder, last = Path(sys.argv[1]), int(sys.argv[2])
write, count = Storage.write_bytes_atomic, 0
def write_or_die(self, path, data):
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path, data)
store = store_of(open_storage(folder / "store"))
Storage.write_bytes_atomic = write_or_die
remember_files(store, tiny_model(), TOKENIZER, text_files(folder / "texts", 3))
"""


@pytest.mark.ci
@pytest.mark.parametrize(("last", "num_complete"), [(5, 1), (6, 1)])
def test_a_kill_leaves_whole_documents_and_the_same_command_resumes(
    tmp_path: Path, last: int, num_complete: int
) -> None:
    """Killed before the second write of the second document, and before its record."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(last)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    store = DocumentStore.open(open_storage(tmp_path / "store"))
    assert len(store.records()) == num_complete
    (problem,) = store.verify()
    assert problem.problem == "has no document.json: whatever wrote it was stopped"
    result = remember_files(store, tiny_model(), TOKENIZER, text_files(tmp_path / "texts", 3))
    assert (result.num_documents, result.num_skipped) == (3 - num_complete, num_complete)
    assert not store.verify()
    untouched = store_of(open_storage(tmp_path / "untouched"))
    remember_files(untouched, tiny_model(), TOKENIZER, text_files(tmp_path / "texts", 3))
    assert [(one.name, one.files) for one in store.records()] == [(one.name, one.files) for one in untouched.records()]


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    store = store_of(open_storage(tmp_path / "store"))
    (file,) = text_files(tmp_path / "texts", 1)
    copy = tmp_path / "texts" / "copy.txt"
    copy.write_bytes(file.read_bytes())
    result = remember_files(store, tiny_model(), TOKENIZER, files_of([tmp_path / "texts"]))
    assert (result.num_documents, result.num_skipped) == (1, 1)
    assert len(store.records()) == 1


def test_long_files_become_parts(tmp_path: Path) -> None:
    store = store_of(open_storage(tmp_path / "store"))
    (file,) = text_files(tmp_path / "texts", 1)
    num_tokens = len(TOKENIZER.encode_batch([file.read_text()])[0])
    seen = []
    result = remember_files(store, tiny_model(), TOKENIZER, [file], 10, lambda *done: seen.append(done))
    parts = -(-num_tokens // 10)
    assert result.num_documents == parts > 2
    assert [one.name for one in store.records()] == [f"{file}#{number}" for number in range(1, parts + 1)]
    assert sum(one.num_tokens for one in store.records()) == num_tokens + parts  # each part begins a document
    assert seen == sorted(seen)
    assert seen[-1] == (file.stat().st_size,) * 2


def test_files_are_found_in_folders(tmp_path: Path) -> None:
    files = text_files(tmp_path / "texts", 2)
    (tmp_path / "texts" / ".hidden").write_text("no")
    (tmp_path / "empty").mkdir()
    assert files_of([files[1], tmp_path / "texts"]) == [files[1], files[0]]
    with pytest.raises(UserError, match=r"empty: the folder holds no files"):
        files_of([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"missing.txt: there is no such file"):
        files_of([tmp_path / "missing.txt"])


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    store = store_of(open_storage(tmp_path / "store"))
    files = text_files(tmp_path / "texts", 3)
    files[0].write_text("")
    files[2].write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"2.txt: byte 3 is not UTF-8"):
        remember_files(store, tiny_model(), TOKENIZER, files)
    assert [one.name for one in store.records()] == [str(files[1])]
    assert remember_files(store, tiny_model(), TOKENIZER, files[:2]).empty == [str(files[0])]
