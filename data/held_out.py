"""A slice's documents for validation: token ids in a file, until they are packed with those of its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.errors import DamagedError
from base.verified import check_file
from data.columns import ColumnsFile, read_columns
from data.packers import Encoded
from data.records import HeldOut, PackingFormat

FOLDER = "held_out"
_TOKENS_AT_ONCE = 1 << 20


def file_name(slice_index: int) -> str:
    """The file of a slice, relative to the folder of the splits."""
    return f"{FOLDER}/{slice_index:05d}.parquet"


class HeldOutWriter:
    """Writes the documents of one slice, in order. Without one there is no file."""

    def __init__(self, path: Path, format_: PackingFormat) -> None:
        columns = {"id": str, "start": np.int64, "end": np.int64, "num_bytes": np.int64, "ids": [format_.token_dtype]}
        if format_.has_loss_mask:
            columns["loss_mask"] = [np.uint8]
        self._file = ColumnsFile(path, columns)
        self._waiting: list[Encoded] = []
        self._num_waiting = 0
        self._num_documents = self._num_tokens = self._num_bytes = 0

    def add(self, document: Encoded) -> None:
        self._waiting.append(document)
        self._num_waiting += document.num_targets
        self._num_documents += 1
        self._num_tokens += document.num_targets
        self._num_bytes += document.num_bytes
        if self._num_waiting >= _TOKENS_AT_ONCE:
            self._flush()

    def finish(self) -> HeldOut | None:
        """Write what is left. Returns None if there was no document."""
        if not self._num_documents:
            return None
        if self._waiting:
            self._flush()
        written = self._file.finish()
        return HeldOut(
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            file_bytes=written.num_bytes,
            sha256=written.sha256,
        )

    def _flush(self) -> None:
        self._file.write(dict(zip(Encoded._fields, zip(*self._waiting, strict=True), strict=True)))
        self._waiting, self._num_waiting = [], 0


def read_held_out(path: Path, held_out: HeldOut) -> Iterator[Encoded]:
    """The documents, in order. Raises: DamagedError: the file is missing or not as it was written."""
    try:
        check_file(path, held_out.file_bytes, held_out.sha256)
    except DamagedError as error:
        raise DamagedError(f"{error}. Delete the record of its slice to have it written again.") from error
    for rows in read_columns(path, rows_at_once=256):
        masks = rows.get("loss_mask", [None] * len(rows["id"]))
        for id_, start, end, num_bytes, ids, mask in zip(
            rows["id"], rows["start"], rows["end"], rows["num_bytes"], rows["ids"], masks, strict=True
        ):
            yield Encoded(id_, int(start), int(end), int(num_bytes), ids, mask)
