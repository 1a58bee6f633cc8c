"""Text behind URLs: the same documents as from local files, and errors that say as much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.config import BytesSource, TokensSource
from data.errors import DataError, SourceUnavailableError
from data.sources import (
    content_identity,
    duplicate_files,
    local_paths,
    plan_slices,
    read_slice,
    stamp,
    with_absolute_paths,
)
from data.sources.remote import RemoteFile
from tests.data.corpora import TEXTS, files, jsonl, texts_of, write

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet")


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store of this process."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("slice_bytes", [1024, 1 << 20])
def test_documents_are_those_of_the_same_file_on_a_disk(
    tmp_path: Path, memory: Any, suffix: str, slice_bytes: int
) -> None:
    path = write(tmp_path / f"c.{suffix}", TEXTS * 20)
    memory.pipe(f"/corpus/c.{suffix}", path.read_bytes())
    assert texts_of(files(f"memory://corpus/c.{suffix}"), slice_bytes) == texts_of(files(path), slice_bytes)


def test_globs_and_names_go_together_and_a_file_is_read_once(tmp_path: Path, memory: Any) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/deep/3.jsonl"):
        memory.pipe(f"/corpus/{name}", jsonl([f"text of {name}"]))
    (tmp_path / "here.jsonl").write_bytes(jsonl(["text here"]))
    deep = files("memory://corpus/**/*.jsonl")
    assert texts_of(deep) == ["text of a/1.jsonl", "text of a/deep/3.jsonl", "text of b/2.jsonl"]
    mixed = files("memory://corpus/b/2.jsonl", tmp_path / "here.jsonl", "memory://corpus/b/*")
    assert texts_of(mixed) == ["text of b/2.jsonl", "text here"]
    assert [Path(name).name for name in duplicate_files(mixed)] == ["2.jsonl"]
    assert local_paths(mixed) == (str(tmp_path / "here.jsonl"),)
    assert with_absolute_paths(mixed).paths == mixed.paths
    (slice_,) = plan_slices(files("memory://corpus/b/2.jsonl"), 1 << 20)
    (document,) = read_slice(slice_)
    assert document.id.endswith("corpus/b/2.jsonl:0")


def test_the_store_tells_what_changed(memory: Any) -> None:
    memory.pipe("/corpus/c.jsonl", jsonl(["one"]))
    source = files("memory://corpus/c.jsonl")
    before = content_identity(source), stamp(source)
    assert (content_identity(source), stamp(source)) == before
    time.sleep(0.01)
    memory.pipe("/corpus/c.jsonl", jsonl(["two"]))  # of the same size
    assert content_identity(source) != before[0]
    assert stamp(source) != before[1]


def test_a_file_that_changed_since_the_plan_or_is_gone_is_named(memory: Any) -> None:
    memory.pipe("/corpus/c.jsonl", jsonl(["one"]))
    (slice_,) = plan_slices(files("memory://corpus/c.jsonl"), 1 << 20)
    memory.pipe("/corpus/c.jsonl", jsonl(["longer"]))
    with pytest.raises(DataError, match=r"corpus/c\.jsonl: \d+ bytes, but \d+ when the work was planned"):
        list(read_slice(slice_))
    memory.rm("/corpus/c.jsonl")
    with pytest.raises(DataError, match=r"corpus/c\.jsonl: No such file or directory"):
        list(read_slice(slice_))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory://corpus/none.jsonl", r"there is no file memory://corpus/none\.jsonl\. Correct the URL"),
        ("memory://corpus/*.txt", r"no file matches 'memory://corpus/\*\.txt'\. Correct the pattern"),
        ("memory://corpus", r"is a folder\. Name files in it, for example memory://corpus/\*\.jsonl"),
        ("memory://corpus/c.odd", "cannot tell the format from the name"),
        ("memory://corpus/empty.jsonl", "empty corpus: all 1 files have 0 bytes"),
        ("nowhere://corpus/c.jsonl", "begins with nowhere://, which is no store known here"),
    ],
)
def test_a_url_that_names_no_text_is_explained(memory: Any, url: str, problem: str) -> None:
    memory.pipe("/corpus/c.odd", b"x")
    memory.pipe("/corpus/empty.jsonl", b"")
    with pytest.raises(DataError, match=problem):
        plan_slices(files(url), 1024)


def test_invalid_text_is_named_by_its_line(memory: Any) -> None:
    memory.pipe("/corpus/c.jsonl", jsonl(["fine", "also"]) + b'{"text": 1}\n')
    with pytest.raises(DataError, match=r"memory://.*corpus/c\.jsonl, line 3: field 'text' is a JSON number"):
        texts_of(files("memory://corpus/c.jsonl"))


def test_bytes_are_read_by_ranges_and_ids_are_refused(memory: Any) -> None:
    raw = bytes(range(256)) * 40
    memory.pipe("/corpus/sound.wav", raw)
    source = BytesSource(kind="bytes", paths=("memory://corpus/sound.wav",), document_bytes=1000)
    documents = [document for slice_ in plan_slices(source, 3000) for document in read_slice(slice_)]
    assert b"".join(document.ids.astype("u1").tobytes() for document in documents) == raw  # type: ignore[union-attr]
    ids = TokensSource(kind="tokens", paths=("memory://corpus/sound.wav",), vocab_size=256)
    with pytest.raises(DataError, match=r"is a URL\. Files of token ids are mapped into memory"):
        plan_slices(ids, 1024)


@pytest.mark.parametrize(
    ("error", "found", "problem"),
    [
        (ConnectionResetError("gone"), SourceUnavailableError, "cannot be read now .ConnectionResetError: gone"),
        (TimeoutError(), SourceUnavailableError, "TimeoutError: no message"),
        (type("NoCredentialsError", (Exception,), {})("none"), DataError, "no valid credentials were found"),
        (PermissionError("no"), PermissionError, "Permission denied"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
)
def test_what_the_clients_of_stores_raise_is_told_apart(
    memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, found: type[Exception], problem: str
) -> None:
    memory.pipe("/corpus/c.jsonl", jsonl(["one"]))
    opened = RemoteFile("memory://corpus/c.jsonl").open()

    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(type(memory), "cat_file", fails)
    with pytest.raises(found, match=problem):
        opened.read(1)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"s3://bucket/c\.jsonl needs a package .*pip install 'bmojo-pipeline\[s3\]'"):
        plan_slices(files("s3://bucket/c.jsonl"), 1024)


def test_a_range_at_a_time_is_fetched(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytes(range(256)) * 64
    memory.pipe("/x/c.bin", raw)
    asked: list[tuple[int, int]] = []
    cat_file = type(memory).cat_file

    def noted(self: Any, path: str, start: int, end: int, **options: Any) -> Any:
        asked.append((start, end))
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", noted)
    monkeypatch.setattr("data.sources.remote._BUFFER_BYTES", 1000)
    with RemoteFile("memory://x/c.bin").open() as file:
        file.seek(5000)
        assert file.read(10) == raw[5000:5010]
        file.seek(-4, 2)
        assert file.read() == raw[-4:]
        file.seek(0)
        assert file.read() == raw
    assert asked[0] == (5000, 6000)
    assert asked[1] == (len(raw) - 4, len(raw))
