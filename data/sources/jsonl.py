"""JSON lines, plain and compressed, from any byte of the text on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from data.config import FilesSource
from data.errors import DataError
from data.sources.compressed import DAMAGE, Compression, Entry, open_text
from data.sources.document import (
    Document,
    LeftOut,
    check_beginning,
    decode_utf8,
    is_blank,
    mend_surrogates,
    without_bom,
)
from data.sources.remote import AnyPath, open_file

_SKIP_BYTES = 1 << 20
_DECODER = json.JSONDecoder(parse_int=float)  # of a number only its type matters, and int refuses 4,301 digits
_SHOWN_CHARS = 60


def read_range(source: FilesSource, path: AnyPath, start: int, end: int) -> Iterator[Document | LeftOut]:
    """The documents of the lines that begin in bytes [start, end) of a plain file."""
    with open_file(path) as file:
        file.seek(max(start - 1, 0))
        for offset, line in _lines(file, start, end):
            if offset == 0:
                check_beginning(line, str(path))
            if found := _parse(source, line, offset, _Place(path, offset)):
                yield found


def read_compressed(
    source: FilesSource, path: AnyPath, compression: Compression, start: int, end: int, entry: Entry
) -> Iterator[Document | LeftOut]:
    """The documents of the lines that begin in bytes [start, end) of the text of a .jsonl.gz or .jsonl.zst file.

    Args: entry: where the file can be entered, before `start`.
    Raises: DataError: the compressed stream is cut off or damaged, or a line is bad.
    """
    tool = "gzip" if compression == "jsonl.gz" else "zstd"
    advice = f"Check the file with `{tool} -t`, and fetch it again if that fails."
    number, read_to = 0, start
    try:
        if not path.stat().st_size:
            raise EOFError("the file has 0 bytes")
        with open_text(path, compression, entry, max(start - 1, 0)) as text:
            for offset, line in _lines(text, start, end):
                number, read_to = number + 1, offset + len(line)
                try:
                    if offset == 0:
                        check_beginning(line, str(path))
                    found = _parse(source, line, offset, _Place(path, offset, compression))
                except DataError as error:
                    raise DataError(f"{error} {advice}") from error.__cause__
                if found:
                    yield found
    except DAMAGE as error:
        where = f"not {tool}, or damaged at its beginning"
        if read_to:
            where = f"damaged or cut off after {f'byte {read_to:,} of its text' if start else f'line {number}'}"
        raise DataError(f"{path}: the compressed stream is {where}: {error}. {advice}") from error


def _lines(text: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in bytes [start, end), each with its first byte. `text` stands at the byte before start."""
    offset = max(start - 1, 0)
    if start:
        while offset < end:  # the rest of the line before, which begins in another range and may be longer than memory
            skipped = text.readline(_SKIP_BYTES)
            offset += len(skipped)
            if not skipped or skipped.endswith(b"\n"):
                break
    while offset < end and (line := text.readline()):
        yield offset, line
        offset += len(line)


class _Place:
    """Where a line is. Its number is only counted when a message needs it."""

    def __init__(self, path: AnyPath, offset: int, compression: Compression | None = None) -> None:
        self.path, self.offset, self._compression = path, offset, compression

    def __str__(self) -> str:
        number, left = 1, self.offset
        with (
            open_text(self.path, self._compression, Entry(0, 0), 0)
            if self._compression
            else open_file(self.path) as file
        ):
            while left and (block := file.read(min(left, 1 << 20))):
                number += block.count(b"\n")
                left -= len(block)
        return f"{self.path}, line {number}"


def _parse(source: FilesSource, line: bytes, start: int, place: _Place) -> Document | LeftOut | None:
    """The document of one line; None for a blank line. Args: start: offset of the line in the text of the file."""
    document_id, end = f"{place.path}:{start}", start + len(line)
    line = without_bom(line)
    if is_blank(line):
        return None
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError:
        decoded_line = decode_utf8(line, source.invalid_utf8, place, place.offset)
        if decoded_line is None:
            return LeftOut(document_id, "invalid_utf8")
        decoded = decoded_line
    try:
        record = _DECODER.decode(decoded)
    except (json.JSONDecodeError, RecursionError) as error:
        advice = "Fix or delete the line."
        if "\0" in decoded:
            advice = "It holds NUL characters: if the file is UTF-16, convert it (iconv -f UTF-16LE -t UTF-8)."
        raise DataError(
            f"{place}: not JSON ({error}): {_shown(decoded)}. Expected one JSON object per line with the text in field "
            f"{source.text_field!r}. {advice}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: found a JSON {_json_type(record)}: {_shown(decoded)}. Expected an object with the text in field "
            f"{source.text_field!r}."
        )
    if source.text_field not in record:
        raise DataError(
            f"{place}: no field {source.text_field!r}; its fields are {', '.join(map(repr, record)) or 'none'}. "
            "Set source.text_field to the one that holds the text, or fix the line."
        )
    text = record[source.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {source.text_field!r} is a JSON {_json_type(text)}, expected a string. "
            "Set source.text_field to the field that holds the text, or fix the line."
        )
    text = mend_surrogates(text, source.invalid_utf8, place)
    return LeftOut(document_id, "invalid_utf8") if text is None else Document(document_id, text, start, end)


def _shown(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
