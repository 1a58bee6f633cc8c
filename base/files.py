"""Files on a local disk, written in one step and safe from a power cut."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def files_below(root: Path) -> list[tuple[Path, str]]:
    """Files under `root` with their relative POSIX paths, sorted; `root` itself as "" if it is a file."""
    if not root.is_dir():
        return [(root, "")]
    files = (path for path in root.rglob("*") if path.is_file() and not is_temporary(path.name))
    return sorted(((path, path.relative_to(root).as_posix()) for path in files), key=lambda pair: pair[1])


def is_temporary(name: str) -> bool:
    """Whether a file of this name is an unfinished write."""
    return name.startswith(".") and name.endswith(".tmp")


class Usage(NamedTuple):
    """Room that files take."""

    num_files: int
    size_bytes: int
    changed_at: float | None  # when the newest was written, in seconds since the epoch; None if nothing tells


def usage(root: Path) -> Usage:
    """Room that a file, or everything under a directory, takes. What goes away meanwhile is left out."""
    paths = (
        [root] if not root.is_dir() else [Path(parent) / name for parent, _, names in os.walk(root) for name in names]
    )
    num_files, size_bytes = 0, 0
    changed_at = root.lstat().st_mtime
    for path in paths:
        with suppress(FileNotFoundError):
            stat = path.lstat()
            num_files += 1
            size_bytes += stat.st_size
            changed_at = max(changed_at, stat.st_mtime)
    return Usage(num_files, size_bytes, changed_at)


def replace(path: Path, data: bytes) -> None:
    """Give the file this content in one step."""
    os.replace(_write_temporary(path, data), path)
    _fsync_directory(path.parent)


def create(path: Path, data: bytes) -> None:
    """Create the file with all its content.

    A hard link to a complete temporary file appears with all its content and fails if the name is taken.
    Raises: FileExistsError.
    """
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with open(path, "xb") as file:  # a file system without hard links
            file.write(data)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_directory(path.parent)


def copy(source: Path, destination: Path) -> None:
    """Copy a file in one step."""
    in_one_step(destination, lambda temporary: shutil.copyfile(source, temporary))


def in_one_step(destination: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file, then give it its name. Makes the folder."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(destination)
    try:
        fill(temporary)
        os.replace(temporary, destination)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync_tree(path: Path) -> None:
    """Return once a file, or everything under a directory, is on the disk, safe from a power cut."""
    if path.is_dir():
        for child in path.iterdir():
            fsync_tree(child)
        _fsync_directory(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        _fsync_directory(path.parent)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
