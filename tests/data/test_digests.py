"""Digests of files are right, read once per content, and survive what can happen to the store of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.sources import digests
from data.sources.digests import STORE_FILE, content_digests, shown_by


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", 0.0)
    return tmp_path / "cache"


def write(folder: Path, contents: list[bytes]) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture
def not_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_digest", lambda piece: pytest.fail(f"{piece.file.path} was read again"))
        yield


@settings(max_examples=30, deadline=None)
@given(contents=st.lists(st.binary(max_size=30), max_size=12), piece_bytes=st.integers(1, 12))
def test_digests_are_those_of_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], piece_bytes: int
) -> None:
    paths = write(tmp_path_factory.mktemp("files"), contents)
    expected = []
    for content in contents:
        pieces = [content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes)] or [b""]
        of_pieces = [hashlib.sha256(piece).digest() for piece in pieces]
        expected.append((of_pieces[0] if len(pieces) == 1 else hashlib.sha256(b"".join(of_pieces)).digest()).hex())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_PIECE_BYTES", piece_bytes)
        patch.setattr(digests, "_AT_ONCE", 5)
        patch.setattr(digests, "_BLOCK_BYTES", 3)
        assert content_digests(paths) == expected
        assert content_digests(paths[::-1]) == expected[::-1]  # from the store


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write(tmp_path, [b"one", b"two"])
    first = content_digests(paths)
    assert first == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_digest", lambda piece: pytest.fail("read again"))
        assert content_digests(paths) == first
        (tmp_path / "link").symlink_to(paths[0])
        assert len(list((tmp_path / "cache").iterdir())) == 1
    paths[0].write_bytes(b"new")
    assert content_digests(paths) == [hashlib.sha256(b"new").hexdigest(), first[1]]
    os.replace(paths[1], paths[0])  # a file of the same name, size and time of change, but another one
    assert content_digests(paths[:1]) == first[1:]


def test_a_file_that_may_still_change_unseen_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", 1000.0)
    paths = write(tmp_path, [b"one"])
    content_digests(paths)
    monkeypatch.setattr(digests, "_digest", lambda piece: hashlib.sha256(b"read again").digest())
    assert content_digests(paths) == [hashlib.sha256(b"read again").hexdigest()]


@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_a_damaged_store_is_begun_again(tmp_path: Path, cache: Path, content: bytes) -> None:
    paths = write(tmp_path, [b"one"])
    cache.mkdir()
    (cache / STORE_FILE).write_bytes(content)
    for _ in range(2):
        assert content_digests(paths) == [hashlib.sha256(b"one").hexdigest()]
    assert (cache / STORE_FILE).read_bytes().startswith(b"SQLite format 3")


def test_a_cache_that_cannot_be_written_costs_only_reading(tmp_path: Path, cache: Path) -> None:
    cache.write_bytes(b"a file where the folder should be")
    assert content_digests(write(tmp_path, [b"one"])) == [hashlib.sha256(b"one").hexdigest()]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.bin: cannot be read: No such file"):
        content_digests([tmp_path / "gone.bin"])


def test_what_takes_a_while_is_shown_up_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(digests, "_SHOWN_AFTER_S", -1.0)
    monkeypatch.setattr(digests, "_SHOWN_EVERY_S", 0.0)
    paths = write(tmp_path, [b"12345", b"", b"678"])
    with shown_by(lambda done, total: seen.append((done, total))):
        content_digests(paths)
        content_digests(paths)  # nothing to read
    assert seen[0] == (5, 8)
    assert seen[-1] == (8, 8)
    assert len(seen) == 3
