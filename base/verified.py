"""Files compared with the digests they were written with: size always, content when a machine first opens them.

That a file's content was right is remembered by its path, size, times and inode, for the process and, between
processes, under the cache directory; so large files are hashed once on each machine, and again if they are touched.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from base.cache import cache_dir
from base.errors import DamagedError

_SETTLED_S = 2.0  # a file that changed later than this ago can change again within the clock's resolution

_verified: set[str] = set()


def check_file(path: Path, size_bytes: int, sha256: str | None) -> None:
    """Compare a file with what was written; only its size where `sha256` is None.

    Raises: DamagedError: the file is missing, or not as it was written.
    """
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path}: missing, expected {size_bytes} bytes") from None
    if stat.st_size != size_bytes:
        raise DamagedError(f"{path}: {stat.st_size} bytes long, expected {size_bytes} bytes")
    if sha256 is None:
        return
    mark = _mark(path, stat, sha256)
    if mark in _verified:
        return
    remembered = cache_dir() / "verified" / mark[:2] / mark[2:]
    if not remembered.exists():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DamagedError(f"{path}: damaged: its SHA-256 is {found[:16]}..., expected {sha256[:16]}...")
        if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED_S:
            return
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.touch()
        except OSError:
            pass  # nowhere to remember it: the next process reads it again
    _verified.add(mark)


def _mark(path: Path, stat: os.stat_result, sha256: str) -> str:
    text = f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\0{sha256}"
    return hashlib.sha256(os.fsencode(text)).hexdigest()
