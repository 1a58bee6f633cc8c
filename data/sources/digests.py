"""Digests of files: read in parallel, and once per content. Why so: docs/design/0015-identity-of-the-source.md."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from base.cache import cache_dir
from base.digest import digest_of
from data.sources.document import reading
from data.sources.remote import AnyPath, RemoteFile

STORE_FILE = "digests.sqlite"
Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""Takes the bytes read and the bytes to be read; called about twice a second, by a reading that takes a while."""

_PIECE_BYTES = 64 << 20  # larger files are read by several threads
_BLOCK_BYTES = 1 << 20
_AT_ONCE = 1024  # pieces given to the threads; what is done is remembered after each such group
_KEYS_AT_ONCE = 500
_SETTLED_S = 2.0  # a file that changed later than this ago can change again within the clock's resolution
_SHOWN_AFTER_S = 2.0
_SHOWN_EVERY_S = 0.5

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Let `progress` show the readings inside that take a while."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def stamp_of(paths: Iterable[AnyPath]) -> str:
    """Digest of the files' names, sizes, inodes and times of change; "" of none."""
    entries = [f"{path}:{_mark(path)}" for path in paths]
    return digest_of(entries) if entries else ""


def identity_of(paths: Sequence[AnyPath]) -> str:
    """Digest of the files' names, without their folders, and contents. Raises DataError: as content_digests.

    Of a file behind a URL the store tells what changes with its content; it is not read.
    """
    local = [path for path in paths if isinstance(path, Path)]
    digests = dict(zip(local, content_digests(local), strict=True))
    versions = (digests[path] if isinstance(path, Path) else path.version() for path in paths)
    return digest_of(entry for path, version in zip(paths, versions, strict=True) for entry in (path.name, version))


def content_digests(paths: Sequence[Path]) -> list[str]:
    """A digest of each file's content: sha256; of a file above 64 MiB sha256 of those of its pieces of 64 MiB.

    They are remembered by path, size, times of change and inode.
    Raises: DataError: a file is gone or forbidden.
    """
    files = []
    for path in paths:
        with reading(path):
            files.append(_File(path, path.stat().st_size, _mark(path)))
    found = _remembered(files)
    unknown = [file for file in files if file.key not in found]
    for file, digest in _read(unknown):
        found[file.key] = digest
    return [found[file.key] for file in files]


class _File(NamedTuple):
    path: Path
    num_bytes: int
    mark: str

    @property
    def key(self) -> bytes:
        return hashlib.sha256(os.fsencode(self.path.absolute())).digest()[:16]


class _Piece(NamedTuple):
    file: _File
    start: int
    is_last: bool


def _read(files: Sequence[_File]) -> Iterator[tuple[_File, str]]:
    total, done = sum(file.num_bytes for file in files), 0
    started = shown = time.monotonic()
    progress = _progress.get()
    pieces = (
        _Piece(file, start, start + _PIECE_BYTES >= file.num_bytes)
        for file in files
        for start in range(0, file.num_bytes or 1, _PIECE_BYTES)
    )
    begun: list[bytes] = []  # digests of the pieces of the file that is not finished
    with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 4)) as pool:
        for group in _groups(pieces, _AT_ONCE):
            finished = []
            for piece, digest in zip(group, pool.map(_digest, group), strict=True):
                begun.append(digest)
                done += min(_PIECE_BYTES, piece.file.num_bytes - piece.start)
                if piece.is_last:
                    whole = begun[0] if len(begun) == 1 else hashlib.sha256(b"".join(begun)).digest()
                    finished.append((piece.file, whole.hex()))
                    begun = []
                now = time.monotonic()
                if progress and now - started > _SHOWN_AFTER_S and (now - shown > _SHOWN_EVERY_S or done == total):
                    shown = now
                    progress(done, total)
            _remember(finished)
            yield from finished


def _digest(piece: _Piece) -> bytes:
    digest = hashlib.sha256()
    left = _PIECE_BYTES
    with reading(piece.file.path), open(piece.file.path, "rb", buffering=0) as file:
        file.seek(piece.start)
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            digest.update(block)  # other threads run meanwhile
            left -= len(block)
    return digest.digest()


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _mark(path: AnyPath) -> str:
    if isinstance(path, RemoteFile):
        return path.version()
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _remembered(files: Sequence[_File]) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    with _store() as store:
        for some in _groups(files, _KEYS_AT_ONCE):
            marks = {file.key: file.mark for file in some}
            asked = f"SELECT key, mark, digest FROM digests WHERE key IN ({','.join('?' * len(marks))})"
            rows = store.execute(asked, list(marks)) if store else ()
            found |= {key: digest for key, mark, digest in rows if marks[key] == mark}
    return found


def _remember(digests: Sequence[tuple[_File, str]]) -> None:
    now_ns = time.time_ns()
    rows = [
        (file.key, file.mark, digest)
        for file, digest in digests
        if now_ns - max(map(int, file.mark.split()[1:3])) >= _SETTLED_S * 1e9
    ]
    with _store() as store:
        if store and rows:
            store.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
            store.commit()


@contextmanager
def _store() -> Iterator[sqlite3.Connection | None]:
    """The file with what is remembered; None if there can be none. What fails in it is only not remembered."""
    path = cache_dir() / STORE_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = sqlite3.connect(path, timeout=5)
    except (OSError, sqlite3.Error):
        yield None  # no home to write to
        return
    with closing(store):
        try:
            store.execute(
                "CREATE TABLE IF NOT EXISTS digests (key BLOB PRIMARY KEY, mark TEXT, digest TEXT) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):
                path.unlink(missing_ok=True)  # damaged: the next reading begins another
            yield None
            return
        with suppress(sqlite3.Error):  # locked for long, a full disk
            yield store
