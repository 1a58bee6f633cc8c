"""A Hugging Face data set, read through the `datasets` library and its cache."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from base.digest import digest_of
from data.config import FORMAT_OF_SUFFIX, HuggingFaceSource
from data.errors import DataError, SourceUnavailableError
from data.paths import expanded
from data.sources.digests import content_digests
from data.sources.document import Document, LeftOut, Part, text_of
from data.sources.hub import chain_of, is_away
from data.sources.parquet import is_text_type

_COMMIT_LENGTH = 40
_ROWS_SAMPLED = 1000

logger = logging.getLogger(__name__)


def content_identity(source: HuggingFaceSource) -> str:
    """Digest of the data set's commit on the Hub (of its files, for a local folder), configuration and split."""
    if where := local_folder(source):
        read = paths(source)
        named = zip(read, content_digests(read), strict=True)
        entries = [entry for path, digest in named for entry in (path.relative_to(where).as_posix(), digest)]
    else:
        entries = [source.dataset, _commit(source)]
    return digest_of([*entries, source.name or "", source.split, source.text_field])


def paths(source: HuggingFaceSource) -> list[Path]:
    """The files of a local folder; none of the Hub, whose commits do not change."""
    where = local_folder(source)
    return sorted(path for path in where.rglob("*") if path.is_file()) if where else []


def local_folder(source: HuggingFaceSource) -> Path | None:
    """The folder that the source names, if it does not name a data set of the Hub."""
    try:
        folder = expanded(source.dataset)
        return folder if folder.is_dir() else None
    except (OSError, DataError):  # too long for a path; a user who is not
        return None


def text_bytes(source: HuggingFaceSource) -> int:
    """About how much text the rows hold."""
    rows = _load(source)
    return int(len(rows) * _mean_bytes(source, rows)) if len(rows) else 0


def plan_parts(source: HuggingFaceSource, slice_bytes: int) -> Iterator[Part]:
    """Runs of rows of about `slice_bytes`, by the mean length of evenly spread rows."""
    rows = _load(source)
    if unread := _unread_files(source):
        logger.warning(
            "source.dataset=%s: the library reads one format of a folder, and leaves out %s. Keep one format in it, or "
            "use source.kind=files.", source.dataset, ", ".join(map(str, unread[:5])) + ", ..." * (len(unread) > 5),
        )  # fmt: skip
    if not len(rows):
        raise DataError(f"source: {source.dataset}, split {source.split}: empty corpus: no rows. Name another split.")
    mean_bytes = _mean_bytes(source, rows)
    step = max(int(slice_bytes / mean_bytes), 1)
    for start in range(0, len(rows), step):
        end = min(start + step, len(rows))
        yield Part(source.dataset, start, end, int((end - start) * mean_bytes), len(rows))


def _mean_bytes(source: HuggingFaceSource, rows: Any) -> float:
    sampled = rows[range(0, len(rows), max(len(rows) // _ROWS_SAMPLED, 1))][source.text_field]
    return sum(len(text or "") for text in sampled) / len(sampled) + 1


def read_part(source: HuggingFaceSource, part: Part) -> Iterator[Document | LeftOut]:
    """The documents of a run of rows; ids are dataset:row."""
    rows = _load(source)
    if len(rows) != part.file_bytes:
        raise DataError(
            f"source: {source.dataset}: {len(rows)} rows here, {part.file_bytes} when the work was planned. Set "
            "source.revision to a commit, so that every machine reads the same data."
        )
    for row in range(part.start, part.end):
        where = f"{source.dataset}, split {source.split}, row {row}"
        text = text_of(rows[row][source.text_field], source.invalid_utf8, f"{where}, column {source.text_field!r}")
        name = f"{source.dataset}:{row}"
        yield LeftOut(name, "invalid_utf8") if text is None else Document(name, text)


def _where(source: HuggingFaceSource) -> str:
    return str(local_folder(source) or source.dataset)


def _load(source: HuggingFaceSource) -> Any:
    """The rows. The library keeps what it fetched, so loading again is quick."""
    datasets = _library("datasets")
    try:
        rows = datasets.load_dataset(_where(source), source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises many types, for a wrong name as for a dead network
        names = f"name={source.name}, split={source.split}, revision={source.revision}"
        raise _explained(source, f"{names}: could not be loaded", error) from error
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
        raise _explained(source, "the Hub did not tell its commit", error) from error


def _explained(source: HuggingFaceSource, what: str, error: Exception) -> Exception:
    """The error of ours for one of the library's, which often hide the cause in their chain."""
    chain = chain_of(error)
    shown = chain[1] if "error occurred while generating" in str(error) and len(chain) > 1 else error
    problem = f"source.dataset={source.dataset}: {what}: {type(shown).__name__}: {str(shown).rstrip('.')}."
    if is_away(error):
        return SourceUnavailableError(f"{problem} The Hub cannot be reached now, or is busy: run again later.")
    if local_folder(source):
        return DataError(f"{problem} Check the files in the folder, and the names.")
    if source.dataset.startswith((".", "/", "~")):
        return DataError(f"source.dataset={source.dataset}: there is no such folder (from {Path.cwd()}).")
    return DataError(
        f"{problem} Check the names on the Hub, and your rights there. A full commit as source.revision needs no "
        "question about it."
    )


def _unread_files(source: HuggingFaceSource) -> list[Path]:
    """Files of text in a local folder that the library passes over."""
    folder = local_folder(source)
    if folder is None:
        return []
    builder = _library("datasets").load_dataset_builder(str(folder), source.name)
    read = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    suffixes = tuple(FORMAT_OF_SUFFIX)
    of_text = [path for path in paths(source) if path.name.lower().endswith(suffixes)]
    return [path for path in of_text if path.resolve() not in read]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"source.kind=huggingface needs the Python package {name}: pip install 'bmojo-pipeline[hf]'."
        ) from error
