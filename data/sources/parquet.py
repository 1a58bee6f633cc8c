"""Parquet files: one column of text, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import FilesSource
from data.errors import DataError
from data.sources.document import Document, decode_utf8

_ROWS_AT_ONCE = 256


def row_group_bytes(path: Path, text_field: str) -> list[int]:
    """Bytes of text in each row group, uncompressed.

    Raises: DataError: not a parquet file, or the column is missing or not a string.
    """
    metadata = _open(path, text_field).metadata
    groups = []
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for index in range(columns.num_columns):
            if columns.column(index).path_in_schema == text_field:
                groups.append(columns.column(index).total_uncompressed_size)
    return groups


def read_row_groups(source: FilesSource, path: Path, groups: range) -> Iterator[Document]:
    """The documents of some row groups; ids are path:row.

    Raises: DataError: the file is damaged, or a value is null or invalid.
    """
    import pyarrow as pa

    file = _open(path, source.text_field)
    row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=[source.text_field]):
            for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                where = f"{path}, row {row}, column {source.text_field!r}"
                if raw is None:
                    raise DataError(f"{where}: found null, expected a string. Drop such rows, or name another column.")
                text = decode_utf8(raw, source.invalid_utf8, where)
                if text is not None:
                    yield Document(f"{path}:{row}", text)
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged near row {row}: {error}. Fetch or write the file again.") from error


def _open(path: Path, text_field: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file: {error}. Fetch or write the file again.") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise DataError(
            f"{path}: no column {text_field!r}; its columns are {', '.join(map(repr, schema.names)) or 'none'}. "
            "Set source.text_field to the one that holds the text."
        )
    column = schema.field(text_field).type
    if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise DataError(
            f"{path}: column {text_field!r} has type {column}, expected string. Set source.text_field to a text column."
        )
    return file
