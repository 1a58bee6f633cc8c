"""The standard library of the running Python as text: .py files, decoded as Python itself would (PEP 263).

A file that does not decode (the library carries none outside its tests, where some are broken on purpose) is left out.
"""

from __future__ import annotations

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from base.digest import digest_of
from data.config import PythonStdlibSource
from data.errors import DataError
from data.sources.digests import content_digests
from data.sources.document import Document, LeftOut, Part

_NEVER = {"__pycache__", "site-packages", "dist-packages"}
_TESTS = {"test", "tests", "idle_test"}


def content_identity(source: PythonStdlibSource) -> str:
    """Digest of the names and contents of the files."""
    names = _names(source)
    digests = content_digests([_root() / name for name in names])
    return digest_of(entry for named in zip(names, digests, strict=True) for entry in named)


def text_bytes(source: PythonStdlibSource) -> int:
    """How much text the files hold."""
    return sum(path.stat().st_size for path in paths(source))


def paths(source: PythonStdlibSource) -> list[Path]:
    """The files it reads."""
    return [_root() / name for name in _names(source)]


def plan_parts(source: PythonStdlibSource, slice_bytes: int) -> Iterator[Part]:
    """One part a file, in the order of their names."""
    root = _root()
    for name in _names(source):
        size = (root / name).stat().st_size
        yield Part(name, 0, size, num_bytes=size, file_bytes=size)


def read_part(source: PythonStdlibSource, part: Part) -> Iterator[Document | LeftOut]:
    """The file as one document, unless it does not decode."""
    raw = (_root() / part.path).read_bytes()
    if len(raw) != part.file_bytes:
        raise DataError(
            f"{_root() / part.path}: {len(raw)} bytes, but {part.file_bytes} when the work was planned: this machine "
            f"has another Python than the one that planned. Use the same Python version on all machines."
        )
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        yield Document(part.path, raw.decode(encoding), 0, len(raw))
    except (SyntaxError, UnicodeDecodeError, LookupError):
        yield LeftOut(part.path, "undecodable")


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _names(source: PythonStdlibSource) -> list[str]:
    root = _root()
    skip = _NEVER if source.include_tests else _NEVER | _TESTS
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith("config-")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    if not names:
        raise DataError(
            f"{root}: no .py file of the standard library (a zipped or stripped Python). Use another Python, or set "
            "source.kind to `files`."
        )
    return sorted(names)
