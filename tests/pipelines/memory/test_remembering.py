"""Files on their way into a store: parts, equal content, a kill at any write, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.memory.remembering import files_of, remember_files
from pipelines.memory.store import EIDETIC, STATE, DocumentStore
from pipelines.storage import open_storage
from tests.pipelines.memory.stores import TOKENIZER, make_old, store_of, text_files
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
from pipelines.storage.local import LocalStorage
write, count = Storage.write_bytes_atomic, 0
def write_or_die(self, path, data):
    global count
    count += 1
    if count == last:
        half = LocalStorage(self.url).path(path)
        half.parent.mkdir(parents=True, exist_ok=True)
        (half.parent / f".{half.name}.0.tmp").write_bytes(data[:9])
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
    assert not store.verify()  # somebody may be writing it
    make_old(tmp_path / "store")
    (problem,) = store.verify()
    assert "is left over: whatever wrote it was stopped" in problem.problem
    result = remember_files(store, tiny_model(), TOKENIZER, text_files(tmp_path / "texts", 3))
    assert (result.num_documents, result.num_skipped) == (3 - num_complete, num_complete)
    assert store.remove_damaged(store.verify()) == 1
    assert not store.verify()
    left = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert sorted(left) == sorted([EIDETIC, STATE] * 3)  # also no half file of the process that was killed
    untouched = store_of(open_storage(tmp_path / "untouched"))
    remember_files(untouched, tiny_model(), TOKENIZER, text_files(tmp_path / "texts", 3))
    assert [(one.name, one.files) for one in store.records()] == [(one.name, one.files) for one in untouched.records()]
    assert len(store.storage.list("tensors")) == 3


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
    assert [one.title for one in store.records()] == [f"{file}#{number}" for number in range(1, parts + 1)]
    assert sum(one.num_tokens for one in store.records()) == num_tokens + parts  # each part begins a document
    assert seen == sorted(seen)
    assert seen[-1] == (file.stat().st_size,) * 2


def test_files_are_found_in_folders(tmp_path: Path) -> None:
    files = text_files(tmp_path / "texts", 2)
    (tmp_path / "texts" / ".hidden").write_text("no")
    (tmp_path / "empty").mkdir()
    assert files_of([files[1], tmp_path / "texts"]) == [files[1], files[0]]
    with pytest.raises(UserError, match=r"empty: there are no files"):
        files_of([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"missing.txt: there is no such file"):
        files_of([tmp_path / "missing.txt"])


def test_stores_in_the_folders_are_no_texts(tmp_path: Path) -> None:
    """The one that is written, before it is made too; and another one, though anybody may call a file store.json."""
    files = text_files(tmp_path / "texts", 2)
    place = tmp_path / "texts" / "notes.store"
    store = store_of(open_storage(place))
    remember_files(store, tiny_model(), TOKENIZER, files)
    store_of(open_storage(tmp_path / "texts" / "below" / "other.store"))
    shop = tmp_path / "texts" / "shop" / "store.json"
    shop.parent.mkdir()
    shop.write_text('{"opens": 9}')
    again = tmp_path / "texts" / ".." / "texts" / "notes.store"
    assert files_of([tmp_path / "texts"], again) == [*files, shop]
    assert files_of([place, files[0]], place) == [files[0]]
    (place / "store.json").unlink()
    assert files_of([tmp_path / "texts"], place) == [*files, shop]


def contents(store: DocumentStore) -> dict[str, str]:
    return {record.title: record.id for record in store.records()}


def id_of(text: str) -> str:
    return DocumentStore.id_of([TOKENIZER.eod_id, *TOKENIZER.encode_batch([text])[0].tolist()])


def test_an_edited_file_replaces_what_was_remembered_of_it(tmp_path: Path) -> None:
    store, (file, other) = store_of(open_storage(tmp_path / "store")), text_files(tmp_path / "texts", 2)

    def again(part_tokens: int | None = None) -> tuple[int, int]:
        result = remember_files(store, tiny_model(), TOKENIZER, [file], part_tokens)
        return result.num_documents, result.num_replaced

    remember_files(store, tiny_model(), TOKENIZER, [file, other])
    unchanged = contents(store)[str(other)]
    file.write_text("print(1)")
    assert again() == (1, 1)
    assert contents(store) == {str(file): id_of("print(1)"), str(other): unchanged}
    num_parts = len(TOKENIZER.encode_batch(["print(1)"])[0])
    assert again(part_tokens=1) == (num_parts, 1)
    assert contents(store).keys() == {str(other), *(f"{file}#{part}" for part in range(1, num_parts + 1))}
    assert again() == (1, num_parts)
    assert contents(store) == {str(file): id_of("print(1)"), str(other): unchanged}
    file.write_text("")
    assert again() == (0, 1)
    assert contents(store) == {str(other): unchanged}
    assert not store.verify()


@pytest.mark.parametrize("edited_first", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_content_that_another_file_still_has_stays(tmp_path: Path, edited_first: bool, order: int) -> None:
    store, (first, second) = store_of(open_storage(tmp_path / "store")), text_files(tmp_path / "texts", 2)
    text = first.read_text()
    second.write_text(text)
    remember_files(store, tiny_model(), TOKENIZER, [first, second])
    edited, same = (first, second) if edited_first else (second, first)
    edited.write_text("print(1)")
    remember_files(store, tiny_model(), TOKENIZER, [first, second][::order])
    assert contents(store) == {str(edited): id_of("print(1)"), str(same): id_of(text)}


def test_a_part_that_is_all_of_its_file_now_is_called_so(tmp_path: Path) -> None:
    store, file = store_of(open_storage(tmp_path / "store")), tmp_path / "a.txt"
    file.write_text("a b")
    *_, last = TOKENIZER.encode_batch(["a b"])[0].tolist()
    remember_files(store, tiny_model(), TOKENIZER, [file], part_tokens=1)
    file.write_bytes(TOKENIZER.decode([last]))
    remember_files(store, tiny_model(), TOKENIZER, [file], part_tokens=1)
    assert contents(store) == {str(file): DocumentStore.id_of([TOKENIZER.eod_id, last])}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    store, file = store_of(open_storage(tmp_path / "store")), tmp_path / "marked.txt"
    file.write_bytes(b"\xef\xbb\xbfprint(1)")
    remember_files(store, tiny_model(), TOKENIZER, [file])
    assert contents(store) == {str(file): id_of("print(1)")}


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    file.write_text("print(1)")
    store = store_of(open_storage(tmp_path / "store"))
    remember_files(store, tiny_model(), TOKENIZER, [file])
    (record,) = store.records()
    assert record.name == f"{tmp_path}/caf\\xe9.txt"
    assert record.model_dump_json().encode()


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    store = store_of(open_storage(tmp_path / "store"))
    files = text_files(tmp_path / "texts", 3)
    files[0].write_text("")
    files[2].write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"2.txt: byte 3 is not UTF-8"):
        remember_files(store, tiny_model(), TOKENIZER, files)
    assert [one.name for one in store.records()] == [str(files[1])]
    assert remember_files(store, tiny_model(), TOKENIZER, files[:2]).empty == [str(files[0])]
