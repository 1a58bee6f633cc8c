"""Columns of numbers and names in small Parquet files, without what pyarrow's own conversions load: pandas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from base.digest import file_sha256

Columns = dict[str, Any]


class WrittenFile(NamedTuple):
    """Size and digest of a file."""

    num_bytes: int
    sha256: str


class ColumnsFile:
    """Writes a Parquet file, group of rows by group of rows; the folder is made for the first.

    Args: columns: names and types. Strings are `str`, numbers a dtype, and lists of numbers [dtype].
    """

    def __init__(self, path: Path, columns: dict[str, Any]) -> None:
        self._path, self._columns = path, columns
        self._schema = pa.schema([(name, _type_of(kind)) for name, kind in columns.items()])
        self._writer: parquet.ParquetWriter | None = None

    def write(self, rows: dict[str, Sequence[Any]]) -> None:
        """Append a group of rows."""
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            encodings = {name: _ENCODINGS[str] for name, kind in self._columns.items() if kind is str}
            encodings |= {name: _ENCODINGS[int] for name, kind in self._columns.items() if _is_whole(kind)}
            self._writer = parquet.ParquetWriter(
                self._path,
                self._schema,
                compression="zstd",
                use_dictionary=False,
                column_encoding=encodings,
                write_page_checksum=True,
            )
        arrays = [_array(rows[name], kind) for name, kind in self._columns.items()]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def finish(self) -> WrittenFile:
        """Close the file, to which something was written."""
        assert self._writer is not None
        self._writer.close()
        return WrittenFile(self._path.stat().st_size, file_sha256(self._path))


def read_columns(file: Any, rows_at_once: int = 1 << 16) -> Iterator[Columns]:
    """Rows of a file of ColumnsFile: numbers as arrays, strings as lists, lists of numbers as lists of arrays.

    Args: file: its path, or an open one.
    """
    with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
        for batch in opened.iter_batches(rows_at_once):
            yield {name: _values(batch.column(name)) for name in batch.schema.names}


_ENCODINGS = {str: "DELTA_BYTE_ARRAY", int: "DELTA_BINARY_PACKED"}


def _is_whole(kind: Any) -> bool:
    return not isinstance(kind, list) and kind is not str


def _type_of(kind: Any) -> pa.DataType:
    if kind is str:
        return pa.string()
    return pa.list_(_type_of(kind[0])) if isinstance(kind, list) else pa.from_numpy_dtype(np.dtype(kind))


def _array(values: Sequence[Any], kind: Any) -> pa.Array:
    if kind is str:
        encoded = [value.encode("utf-8", "backslashreplace") for value in values]
        raw = b"".join(encoded)
        return pa.Array.from_buffers(pa.string(), len(encoded), [None, _ends(encoded), pa.py_buffer(raw)])
    if isinstance(kind, list):
        numbers = _array(np.concatenate(values), kind[0])
        return pa.Array.from_buffers(_type_of(kind), len(values), [None, _ends(values)], children=[numbers])
    numbers = np.ascontiguousarray(values, np.dtype(kind))
    return pa.Array.from_buffers(_type_of(kind), len(numbers), [None, pa.py_buffer(numbers)])


def _ends(values: Sequence[Any]) -> pa.Buffer:
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=ends[1:])
    return pa.py_buffer(ends)


def _values(array: pa.Array) -> Any:
    if pa.types.is_string(array.type):
        return array.to_pylist()
    if pa.types.is_list(array.type):
        numbers = _values(array.values)
        ends = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        return [numbers[start:end] for start, end in pairwise(ends)]
    dtype = np.dtype(str(array.type))  # int64 and the like are called the same
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
