"""Digests of files, kept between runs for the big ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from base.cache import cache_dir
from base.digest import digest_of, file_sha256

_CACHED_FROM_BYTES = 64 << 20  # a smaller file is read again sooner than a cache is worth


def stamp_of(paths: Iterable[Path]) -> str:
    """Digest of the files' names, sizes, inodes and times of change; "" of none."""
    entries = [f"{path}:{_mark(path)}" for path in paths]
    return digest_of(entries) if entries else ""


def remembered_sha256(path: Path) -> str:
    """sha256 of a file's content. For a big file it is remembered by path, size and time of change."""
    stat = path.stat()
    if stat.st_size < _CACHED_FROM_BYTES:
        return file_sha256(path)
    known = _cache_file(path)
    mark = _mark(path)
    try:
        entry = json.loads(known.read_text())
        if entry["mark"] == mark:
            return str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there or damaged: compute it
    sha256 = file_sha256(path)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"mark": mark, "sha256": sha256}))
        temporary.replace(known)
    except OSError:
        pass  # no home to write to: the next run computes it again
    return sha256


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache_file(path: Path) -> Path:
    return cache_dir() / "digests" / (hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32] + ".json")
