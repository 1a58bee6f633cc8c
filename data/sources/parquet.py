"""Parquet files: one column of text, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet, types

from data.config import FilesSource
from data.errors import DataError
from data.sources.document import Document, LeftOut, text_of
from data.sources.remote import AnyPath

_ROWS_AT_ONCE = 256


def row_group_bytes(path: AnyPath, text_field: str) -> list[int]:
    """Bytes of text in each row group, uncompressed.

    Raises: DataError: not a parquet file, or the column is missing or not a string.
    """
    file = _open(path, text_field)
    column = _leaf(file, text_field)
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    return [group.column(column).total_uncompressed_size for group in groups]


def read_row_groups(source: FilesSource, path: AnyPath, groups: range) -> Iterator[Document | LeftOut]:
    """The documents of some row groups; ids are path:row.

    A damaged page is found by its checksum, if the file was written with them, by its compression, or by values outside
    the least and the greatest that the file notes for a row group. Damage that passes all three cannot be seen.
    Raises: DataError: the file is damaged, or a value is null or invalid.
    """
    file = _open(path, source.text_field)
    row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
    try:
        for group in groups:
            least, greatest = _bounds(file, group, source.text_field)
            # A dotted name also selects the field of a struct: hence the choice by name.
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[source.text_field]):
                for raw in batch.column(source.text_field).cast(pa.large_binary()).to_pylist():
                    where = f"{path}, row {row}, column {source.text_field!r}"
                    if raw is not None and not (least <= raw and (greatest is None or raw <= greatest)):
                        raise _damaged(path, row, "a value is outside the range that the file notes for its row group")
                    text = text_of(raw, source.invalid_utf8, where)
                    name = f"{path}:{row}"
                    yield LeftOut(name, "invalid_utf8") if text is None else Document(name, text)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise _damaged(path, row, str(error)) from error


def _bounds(file: Any, group: int, text_field: str) -> tuple[bytes, bytes | None]:
    """The least and the greatest value in a row group as the file notes them; no bounds if it does not."""
    statistics = file.metadata.row_group(group).column(_leaf(file, text_field)).statistics
    try:
        if statistics is None or not statistics.has_min_max:
            return b"", None
        least, greatest = (x.encode() if isinstance(x, str) else bytes(x) for x in (statistics.min, statistics.max))
        return least, greatest
    except (UnicodeDecodeError, TypeError):  # cut inside a character, or of a type that has no order here
        return b"", None


def _leaf(file: Any, text_field: str) -> int:
    """Index of a top-level column among the file's leaf columns, of which a struct has several."""
    schema = file.schema
    leaves = [index for index in range(len(schema)) if schema.column(index).path == text_field]
    tops = [index for index in leaves if schema.column(index).name == text_field]
    return (tops or leaves)[0]


def _damaged(path: AnyPath, row: int, problem: str) -> DataError:
    return DataError(f"{path}: damaged near row {row}: {problem}. Fetch or write the file again.")


def _open(path: AnyPath, text_field: str) -> Any:
    try:
        file = parquet.ParquetFile(path if isinstance(path, Path) else path.open(), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the operating system's; Arrow's own OSErrors have none
            raise
        raise DataError(f"{path}: not a whole parquet file: {error}. Fetch or write the file again.") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise DataError(
            f"{path}: no column {text_field!r}; its columns are {', '.join(map(repr, schema.names)) or 'none'}. "
            "Set source.text_field to the one that holds the text."
        )
    if (found := schema.names.count(text_field)) > 1:
        raise DataError(f"{path}: {found} columns are named {text_field!r}, expected one. Write the file again.")
    column = schema.field(text_field).type
    if not is_text_type(column):
        raise DataError(
            f"{path}: column {text_field!r} has type {column}, expected string. Set source.text_field to a text column."
        )
    return file


def is_text_type(arrow_type: Any) -> bool:
    """Whether a column of this Arrow type holds text: strings or bytes in any layout, also behind a dictionary."""
    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    of_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    views = (types.is_string_view, types.is_binary_view)
    return any(holds(arrow_type) for holds in (*of_text, *views))
