"""The files that a source's paths and globs name."""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.paths import expanded
from data.sources.remote import AnyPath, RemoteFile, find_remote, is_url

_SHOWN_CHARS = 60


class Found(NamedTuple):
    """Files in the order they are read, and names that lead to one of them once more."""

    paths: list[AnyPath]
    duplicates: list[AnyPath]


def find_files(patterns: Sequence[str], check: Callable[[AnyPath], object], example: str) -> Found:
    """The files that paths and globs name.

    Args:
        check: refuses a file by its name.
        example: how files in a folder are named, for messages.
    Raises: DataError: one is missing or no file, or all are empty; and what `check` raises.
    """
    found = Found([], [])
    seen: set[object] = set()
    for path in (path for pattern in patterns for path in _matches(pattern, example)):
        check(path)
        if isinstance(path, RemoteFile):
            identity: object = path
        else:
            stat = path.stat()
            path, identity = path.absolute(), (stat.st_dev, stat.st_ino)
        (found.duplicates if identity in seen else found.paths).append(path)
        seen.add(identity)
    if not any(path.stat().st_size for path in found.paths):
        raise DataError(f"source.paths: empty corpus: all {len(found.paths)} files have 0 bytes. Name files with text.")
    return found


def _matches(pattern: str, example: str) -> Sequence[AnyPath]:
    if is_url(pattern):
        try:
            return find_remote(pattern, example)
        except OSError as error:
            what = "there is no file" if error.errno == errno.ENOENT else "no right to read"
            raise DataError(
                f"source.paths: {what} {pattern}. Correct the URL, or allow reading it on every machine."
            ) from error
    try:
        return _regular_files(pattern, expanded(pattern, "source.paths"), example)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
            raise
        shown = pattern if len(pattern) <= _SHOWN_CHARS else f"{pattern[:_SHOWN_CHARS]}..."
        raise DataError(
            f"source.paths: {shown}: {error.strerror}. Correct the path, or allow entering its folders."
        ) from error


def _regular_files(pattern: str, named: Path, example: str) -> list[Path]:
    if named.is_dir():
        raise DataError(
            f"source.paths: {pattern} is a folder. Name files in it, for example {pattern.rstrip('/')}/{example}."
        )
    is_glob = glob.has_magic(pattern) and not named.exists()
    found = [Path(name) for name in sorted(glob.glob(str(named), recursive=True))] if is_glob else [named]
    if is_glob:
        found = [path for path in found if not path.is_dir() and not _is_endless(path)]
    if not found:
        raise DataError(f"source.paths: no file matches {pattern!r} (from {Path.cwd()}). Correct the pattern.")
    for path in found:
        if not path.is_file():
            what = f"{path} is not a regular file" if path.exists() else f"there is no file {path}"
            raise DataError(f"source.paths: {what} (from {Path.cwd()}). Correct the path.")
    return found


def _is_endless(path: Path) -> bool:
    """Whether a glob came here by way of a link to a folder above, once too often."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
