"""Small corpora in every format, and what comes back from them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data.config import FilesSource, Source
from data.sources import plan_slices, read_slice

TEXTS = ["plain", "zwei\nlines\r\n", "\u00e9\U0001f600\u2028", "<|endoftext|>", "x" * 5000, "\ufeffmark"]


def files(*paths: object, **fields: Any) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), **fields)


def texts_of(source: Source, slice_bytes: int = 1 << 20) -> list[str]:
    return [document.text for slice_ in plan_slices(source, slice_bytes) for document in read_slice(slice_)]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Nothing is forbidden to root: as another user meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def write(path: Path, texts: list[str]) -> Path:
    """A corpus in the format of the path's suffix."""
    match path.name.partition(".")[2]:
        case "jsonl":
            path.write_bytes(jsonl(texts))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(jsonl(texts)))
        case "jsonl.zst":
            frames = [zstandard.compress(jsonl(texts[:2])), zstandard.compress(jsonl(texts[2:]))]
            path.write_bytes(b"".join(frames))
        case "txt":
            path.write_text("".join(texts))
        case "parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
    return path
