"""Which documents a sample is made of: a table of documents beside the shards of each stream.

It is a Parquet file, one row per document in the order of their places. A place is counted in the targets of the
stream's samples, padding included: the document's first target is target `position` % seq_len of sample `position` //
seq_len of the folder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from base.errors import DamagedError
from base.sealed import unseal
from data.columns import ColumnsFile, WrittenFile, read_columns
from data.index import REMEDY, ShardIndex, folder_name
from data.packers import Placed
from data.records import Packed, SliceRecord, ValidationRecord, record_name

if TYPE_CHECKING:
    from data.shards import TokenSplit

DOCUMENTS_FILE = "documents.parquet"
_ROWS_AT_ONCE = 1 << 14
_COLUMNS = {
    "id": str,
    "start": np.int64,
    "end": np.int64,
    "num_bytes": np.int64,
    "num_tokens": np.int64,
    "position": np.int64,
}
"""Name of a document; the bytes of its file that hold it (-1: not known); bytes of its text; its tokens without the
end-of-document token; its place."""


class DocumentsWriter:
    """Writes the table of a stream's documents into the folder of its shards."""

    def __init__(self, folder: Path) -> None:
        self._file = ColumnsFile(folder / DOCUMENTS_FILE, _COLUMNS)
        self._rows: list[tuple[str, int, int, int, int, int]] = []

    def add(self, documents: Sequence[Placed]) -> None:
        """Append documents, in the order of their places."""
        for document, position in documents:
            self._rows.append(
                (document.id, document.start, document.end, document.num_bytes, len(document.ids), position)
            )
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> WrittenFile:
        """Write what is left, at least one document in all."""
        if self._rows:
            self._flush()
        return self._file.finish()

    def _flush(self) -> None:
        self._file.write(dict(zip(_COLUMNS, zip(*self._rows, strict=True), strict=True)))
        self._rows = []


class SamplePart(NamedTuple):
    """A document, or a piece of one, in a sample.

    id: name of the document, such as `books.jsonl:12` (path and byte) or `a.parquet:7` (path and row).
    start, end: the bytes of its file that hold the whole document; None where they are not known.
    num_tokens: of the whole document.
    targets: which targets of the sample are the piece; the last of a document is its end.
    tokens: which tokens of the document they are; its end counts as token num_tokens.
    """

    id: str
    start: int | None
    end: int | None
    num_tokens: int
    targets: range
    tokens: range


class SamplePlace(NamedTuple):
    """Where a sample stands: its shard and number in that, the number of its folder and its number in that."""

    shard: str
    in_shard: int
    folder_number: int
    in_folder: int


def place_of(index: ShardIndex, sample: int) -> SamplePlace:
    """Where a sample of a split is stored. Args: sample: its number in the split."""
    ends = index.sample_ends
    shard = int(np.searchsorted(ends, sample, side="right"))
    folders = index.folders
    first_shard = int(np.searchsorted(folders, folders[shard]))
    shard_begin, folder_begin = (int(ends[at] - index.shard_samples[at]) for at in (shard, first_shard))
    number = int(folders[shard])
    return SamplePlace(index.entry(shard).name, sample - shard_begin, number, sample - folder_begin)


def documents_of(tokens: TokenSplit, sample: int) -> list[SamplePart]:
    """The documents that a sample's targets are taken from, in order. No text and no shard is read.

    Args: sample: its number in the split.
    Raises: DataError, DamagedError: the index or the table is missing, or not as it was written.
    """
    seq_len = tokens.index.format.seq_len
    place = place_of(tokens.index, sample)
    begin, end = place.in_folder * seq_len, (place.in_folder + 1) * seq_len
    parts = []
    for rows in _table(tokens, place.folder_number):
        firsts = rows["position"]
        lasts = firsts + rows["num_tokens"]  # the target that is the document's end
        for row in range(int(np.searchsorted(lasts, begin)), int(np.searchsorted(firsts, end))):
            first, stop = max(int(firsts[row]), begin), min(int(lasts[row]) + 1, end)
            parts.append(
                SamplePart(
                    id=rows["id"][row],
                    start=_known(rows["start"][row]),
                    end=_known(rows["end"][row]),
                    num_tokens=int(rows["num_tokens"][row]),
                    targets=range(first - begin, stop - begin),
                    tokens=range(first - int(firsts[row]), stop - int(firsts[row])),
                )
            )
    return parts


class Documents(NamedTuple):
    """All documents of a split, in the order of their places. n: documents.

    Here places go on from folder to folder: target t of sample s of the split stands at s * seq_len + t.

    Attributes:
        ids: names of the documents, such as `books.jsonl:12`.
        place_n: of each document's first target.
        num_tokens_n: without the end-of-document token, which is the document's last target.
        num_bytes_n: of the text.
    """

    ids: Sequence[str]
    place_n: np.ndarray
    num_tokens_n: np.ndarray
    num_bytes_n: np.ndarray

    def of_places(self, places: np.ndarray) -> np.ndarray:
        """The number of the document that has the target at each place; of padding, that of the one before it."""
        return np.searchsorted(self.place_n, places, side="right") - 1


def all_documents(tokens: TokenSplit) -> Documents:
    """The tables of a split, put together. No text and no shard is read. Raises as read_documents."""
    index = tokens.index
    firsts = (index.sample_ends - index.shard_samples) * index.format.seq_len
    ids: list[str] = []
    columns: dict[str, list[np.ndarray]] = {"position": [], "num_tokens": [], "num_bytes": []}
    for folder in np.unique(index.folders).tolist():
        begin = int(firsts[np.searchsorted(index.folders, folder)])
        for rows in _table(tokens, folder):
            ids += rows["id"]
            for name, parts in columns.items():
                parts.append(rows[name] + (begin if name == "position" else 0))
    return Documents(ids, *(np.concatenate(parts) for parts in columns.values()))


def read_documents(tokens: TokenSplit) -> Iterator[Mapping[str, Any]]:
    """The rows of all tables of a split, by column, in the order of the documents' places.

    Raises: DataError, DamagedError: the index or a table is missing, or not as it was written.
    """
    for folder in np.unique(tokens.index.folders).tolist():
        yield from _table(tokens, folder)


def document_tables(tokens: TokenSplit) -> Iterator[tuple[str, str | None]]:
    """The name of each table of a split, and what is wrong with it; None: nothing."""
    for folder in np.unique(tokens.index.folders).tolist():
        problem = None
        try:
            for _ in _table(tokens, folder):
                pass
        except DamagedError as error:
            problem = str(error)
        yield _table_name(tokens, folder), problem


def _table_name(tokens: TokenSplit, folder: int) -> str:
    return f"{tokens.split}/{folder_name(folder)}/{DOCUMENTS_FILE}"


def _table(tokens: TokenSplit, folder: int) -> Iterator[Mapping[str, Any]]:
    name = _table_name(tokens, folder)
    try:
        data = tokens.files.read(name)
        if hashlib.sha256(data).hexdigest() != _packed(tokens, folder).documents_sha256:
            raise DamagedError("its content does not match the digest in the record of its slice")
        yield from read_columns(io.BytesIO(data))
    except (OSError, ValueError, KeyError, DamagedError) as error:  # Arrow's are of the first two kinds
        raise DamagedError(f"{tokens.files}/{name}: missing or damaged: {error}. {REMEDY}") from error


def _packed(tokens: TokenSplit, folder_number: int) -> Packed:
    """The record of what is in a folder. Raises: FileNotFoundError, DamagedError."""
    name = record_name(tokens.split, folder_number)
    fields = unseal(tokens.files.read(name), f"{tokens.files}/{name}")
    if tokens.split == "valid":
        return ValidationRecord.model_validate(fields).valid
    train = SliceRecord.model_validate(fields).train
    assert train is not None
    return train


def _known(byte: np.int64) -> int | None:
    return None if byte < 0 else int(byte)
