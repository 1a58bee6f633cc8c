"""Any files as documents of their bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.config import BytesSource
from data.sources.digests import identity_of
from data.sources.document import LeftOut, Part, TokenDocument, check_unchanged, reading
from data.sources.named import Found, find_files
from data.sources.remote import AnyPath, open_file, path_of


def content_identity(source: BytesSource) -> str:
    """Digest of the names and contents of the files."""
    return identity_of(paths(source))


def text_bytes(source: BytesSource) -> int:
    """Size of the files."""
    return sum(path.stat().st_size for path in paths(source))


def paths(source: BytesSource) -> list[AnyPath]:
    """The files it reads."""
    return find(source).paths


def find(source: BytesSource) -> Found:
    """The files a source names. Raises DataError: one is missing or no file, or all are empty."""
    return find_files(source.paths, lambda path: None, "*")


def plan_parts(source: BytesSource, slice_bytes: int) -> Iterator[Part]:
    """Pieces of the files, in order, of whole documents and about slice_bytes."""
    step = max(slice_bytes // source.document_bytes, 1) * source.document_bytes
    for path in paths(source):
        size = path.stat().st_size
        for start in range(0, size or 1, step):
            end = min(start + step, size)
            yield Part(str(path), start, end, end - start, size)


def read_part(source: BytesSource, part: Part) -> Iterator[TokenDocument | LeftOut]:
    """The documents of one part. Raises DataError: the file is gone or has changed."""
    check_unchanged(part)
    path = path_of(part.path)
    if part.start == part.end:
        yield LeftOut(str(path), "empty")
        return
    with reading(path), open_file(path) as file:
        file.seek(part.start)
        for start in range(part.start, part.end, source.document_bytes):
            ids = np.frombuffer(file.read(min(source.document_bytes, part.end - start)), np.uint8)
            yield TokenDocument(f"{path}:{start}", ids, start, start + len(ids), num_bytes=len(ids))
