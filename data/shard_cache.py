"""A bounded folder of shards fetched from elsewhere, shared by all processes of a machine, in which any may be killed.

A shard is named by its digest, so runs that read the same shards share them. While a process has one open it holds a
shared lock on the file; while one is arriving, its file (.part, as long as the shard will be) is locked exclusively.
The kernel frees the locks of the dead. So a file that can be locked exclusively is not in use: a shard makes room for
another, the one opened longest ago first, and a .part is left over from a process that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from base.errors import DamagedError, UserError
from data.index import REMEDY
from data.records import ShardEntry, Split

_FETCHES_AT_ONCE = 4
_POLL_S = 0.05
_FULL_S = 60.0  # how long others may keep the room that a shard needs

log = logging.getLogger(__name__)


class CachedShardFiles:
    """Shards of a storage, fetched when they are needed (data.shards.ShardFiles).

    Args:
        url: the place, for messages.
        read: the content of a small file by its name. Raises FileNotFoundError.
        copy: copies a file by its name to a path. Raises FileNotFoundError.
        folder: the cache on this machine.
        limit_bytes: what the shards in the cache may take, with those that are arriving.
    """

    def __init__(
        self,
        url: str,
        read: Callable[[str], bytes],
        copy: Callable[[str, Path], None],
        folder: Path,
        limit_bytes: int,
    ) -> None:
        self._url, self._read, self._copy = url, read, copy
        self._folder, self._limit_bytes = folder, limit_bytes
        self._fetches = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="fetch-shards")
        self._ahead: dict[str, Future[None]] = {}

    def read(self, name: str) -> bytes:
        return self._read(name)

    def open(self, split: Split, entry: ShardEntry) -> BinaryIO:
        while True:
            file = self._opened(entry)
            if file is not None:
                return file
            self._fetch(split, entry)

    def fetch_ahead(self, split: Split, entries: Sequence[ShardEntry]) -> None:
        """As many as there is room for, in their order. An error is left to the one who opens the shard."""
        self._ahead = {name: future for name, future in self._ahead.items() if not future.done()}
        num_bytes = 0
        for entry in entries:
            num_bytes += entry.num_bytes
            if num_bytes > self._limit_bytes:
                return
            if entry.sha256 not in self._ahead and not self._path(entry).exists():
                self._ahead[entry.sha256] = self._fetches.submit(self._fetch, split, entry, patience_s=0.0)

    def __str__(self) -> str:
        return self._url

    def _path(self, entry: ShardEntry) -> Path:
        return self._folder / f"{entry.sha256}.mds"

    def _opened(self, entry: ShardEntry) -> BinaryIO | None:
        try:
            file = open(self._path(entry), "rb")  # noqa: SIM115  # held as long as the shard is open
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # made room for another between the two
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def _fetch(self, split: Split, entry: ShardEntry, patience_s: float = _FULL_S) -> None:
        """Have the shard in the cache, unless (`patience_s` 0) there is no room. Raises DamagedError, UserError."""
        part = self._folder / f"{entry.sha256}.part"
        deadline = time.monotonic() + patience_s
        while not self._path(entry).exists():
            with self._alone():
                file = _created(part)
                reserved = file is not None and self._make_room(part, file, entry.num_bytes)
            if file is None:  # someone else is fetching it
                time.sleep(_POLL_S)
                continue
            with file:
                if reserved:
                    self._receive(split, entry, part)
                    return
                part.unlink()
            if time.monotonic() > deadline:
                if not patience_s:
                    return
                raise UserError(
                    f"{self._folder}: the {entry.num_bytes:,} bytes of a shard do not fit into the cache of "
                    f"{self._limit_bytes:,} bytes beside the shards in use. Raise data.cache_bytes, or lower "
                    "data.shuffle_block_samples."
                )
            time.sleep(_POLL_S)

    def _receive(self, split: Split, entry: ShardEntry, part: Path) -> None:
        name = f"{split}/{entry.name}"
        arriving = part.with_suffix(f".{os.getpid()}.arriving")
        try:
            self._copy(name, arriving)
            with open(arriving, "rb") as arrived:
                found = hashlib.file_digest(arrived, "sha256").hexdigest()
            if found != entry.sha256:
                raise DamagedError(
                    f"{self._url}/{name}: damaged: its SHA-256 is {found[:16]}..., expected {entry.sha256[:16]}.... "
                    f"{REMEDY}"
                )
        except BaseException as error:
            arriving.unlink(missing_ok=True)
            part.unlink()
            if isinstance(error, FileNotFoundError):
                raise DamagedError(f"{self._url}/{name}: missing, expected {entry.num_bytes} bytes. {REMEDY}") from None
            raise
        with self._alone():  # whoever counts what is there sees it either here or there
            os.replace(arriving, self._path(entry))
            part.unlink()

    def _make_room(self, part: Path, file: BinaryIO, num_bytes: int) -> bool:
        """Reserve the room of a shard that will arrive, by the size of its .part. Whether there is enough."""
        used = 0
        shards: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".part" and path != part and _is_left_over(path):
                    for left in self._folder.glob(f"*{path.stem}.*"):
                        if left.suffix != ".mds":
                            left.unlink()
                    continue
                if path.suffix in (".mds", ".part"):
                    used += stat.st_size
                if path.suffix == ".mds":
                    shards.append((stat.st_mtime, stat.st_size, path))
        for _, size, path in sorted(shards):
            if used + num_bytes <= self._limit_bytes:
                break
            if _removed(path):
                used -= size
        if used + num_bytes > self._limit_bytes:
            return False
        os.truncate(file.fileno(), num_bytes)
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """As the only process that adds to the cache."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _created(part: Path) -> BinaryIO | None:
    """The file, locked by this process; None if another one has it."""
    file = open(part, "ab")  # noqa: SIM115  # held until the shard has arrived
    if _locked(file) and os.fstat(file.fileno()).st_nlink:
        return file
    file.close()
    return None


def _is_left_over(part: Path) -> bool:
    with open(part, "ab") as file:
        return _locked(file)


def _removed(path: Path) -> bool:
    """Remove a shard unless someone has it open."""
    with open(path, "rb") as file:
        if free := _locked(file):
            path.unlink()
    return free


def _locked(file: BinaryIO) -> bool:
    """Lock a file unless somebody holds it. Whether it is ours now, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
