"""A Hugging Face data set, read through the `datasets` library and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import HuggingFaceSource
from data.errors import DataError
from data.sources.digests import digest_of, file_sha256
from data.sources.document import Document, Part, text_of
from data.sources.parquet import is_text_type

_COMMIT_LENGTH = 40
_ROWS_SAMPLED = 1000


def content_identity(source: HuggingFaceSource) -> str:
    """Digest of the data set's commit on the Hub (of its files, for a local folder), configuration and split."""
    where = Path(source.dataset)
    if where.is_dir():
        entries = [entry for path in paths(source) for entry in (path.relative_to(where).as_posix(), file_sha256(path))]
    else:
        entries = [source.dataset, _commit(source)]
    return digest_of([*entries, source.name or "", source.split, source.text_field])


def paths(source: HuggingFaceSource) -> list[Path]:
    """The files of a local folder; none of the Hub, whose commits do not change."""
    where = Path(source.dataset)
    return sorted(path for path in where.rglob("*") if path.is_file()) if where.is_dir() else []


def plan_parts(source: HuggingFaceSource, slice_bytes: int) -> Iterator[Part]:
    """Runs of rows of about `slice_bytes`, by the mean length of evenly spread rows."""
    rows = _load(source)
    if not len(rows):
        raise DataError(f"source: {source.dataset}, split {source.split}: empty corpus: no rows. Name another split.")
    sampled = rows[range(0, len(rows), max(len(rows) // _ROWS_SAMPLED, 1))][source.text_field]
    mean_bytes = sum(len(text or "") for text in sampled) / len(sampled) + 1
    step = max(int(slice_bytes / mean_bytes), 1)
    for start in range(0, len(rows), step):
        end = min(start + step, len(rows))
        yield Part(source.dataset, start, end, int((end - start) * mean_bytes), len(rows))


def read_part(source: HuggingFaceSource, part: Part) -> Iterator[Document]:
    """The documents of a run of rows; ids are dataset:row."""
    rows = _load(source)
    if len(rows) != part.file_bytes:
        raise DataError(
            f"source: {source.dataset}: {len(rows)} rows here, {part.file_bytes} when the work was planned. Set "
            "source.revision to a commit, so that every machine reads the same data."
        )
    for row in range(part.start, part.end):
        where = f"{source.dataset}, split {source.split}, row {row}"
        text = text_of(rows[row][source.text_field], "error", f"{where}, column {source.text_field!r}")
        assert text is not None  # the policy is `error`
        yield Document(f"{source.dataset}:{row}", text)


def _load(source: HuggingFaceSource) -> Any:
    """The rows. The library keeps what it fetched, so loading again is quick."""
    datasets = _library("datasets")
    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises many types, for a wrong name as for a dead network
        raise DataError(
            f"source.dataset={source.dataset}, name={source.name}, split={source.split}, revision={source.revision}: "
            f"could not be loaded: {type(error).__name__}: {error}. Check the names on the Hub and the network."
        ) from error
    if source.text_field not in rows.column_names:
        raise DataError(
            f"source.dataset={source.dataset}: no column {source.text_field!r}; its columns are "
            f"{', '.join(map(repr, rows.column_names))}. Set source.text_field to the one that holds the text."
        )
    column = rows.data.schema.field(source.text_field).type
    if not is_text_type(column):
        raise DataError(
            f"source.dataset={source.dataset}: column {source.text_field!r} has type {column}, expected string. Set "
            "source.text_field to a column of text."
        )
    return rows


def _commit(source: HuggingFaceSource) -> str:
    revision = source.revision or ""
    if len(revision) == _COMMIT_LENGTH and set(revision) <= set("0123456789abcdef"):
        return revision
    hub = _library("huggingface_hub")
    try:
        return str(hub.HfApi().dataset_info(source.dataset, revision=source.revision).sha)
    except Exception as error:
        raise DataError(
            f"source.dataset={source.dataset}: the Hub did not tell its commit: {type(error).__name__}: {error}. "
            "Check the name and the network, or set source.revision to a full commit, which needs no question."
        ) from error


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"source.kind=huggingface needs the Python package {name}: pip install 'bmojo-pipeline[hf]'."
        ) from error
