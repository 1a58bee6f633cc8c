"""JSON lines, plain (from any byte on) and compressed (from the start)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from data.config import FilesSource
from data.errors import DataError
from data.sources.document import (
    Document,
    LeftOut,
    check_beginning,
    decode_utf8,
    is_blank,
    mend_surrogates,
    without_bom,
)

_BLOCK_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20
_DECODER = json.JSONDecoder(parse_int=float)  # of a number only its type matters, and int refuses 4,301 digits
_SHOWN_CHARS = 60


def read_range(source: FilesSource, path: Path, start: int, end: int) -> Iterator[Document | LeftOut]:
    """The documents of the lines that begin in bytes [start, end) of a plain file."""
    with open(path, "rb", buffering=1 << 20) as file:
        if start:
            file.seek(start - 1)
            while file.tell() < end and not file.readline(_SKIP_BYTES).endswith(b"\n"):
                pass  # the rest of the line before, which begins in another range and may be longer than memory
        while (offset := file.tell()) < end:
            line = file.readline()
            if offset == 0:
                check_beginning(line, str(path))
            yield from _parse(source, line, f"{path}:{offset}", offset, _Place(path, offset))


def read_compressed(
    source: FilesSource, path: Path, format_: Literal["jsonl.gz", "jsonl.zst"]
) -> Iterator[Document | LeftOut]:
    """The documents of a .jsonl.gz or .jsonl.zst file.

    Raises: DataError: the compressed stream is cut off or damaged, or a line is bad.
    """
    tool = "gzip" if format_ == "jsonl.gz" else "zstd"
    advice = f"Check the file with `{tool} -t`, and fetch it again if that fails."
    number = 0
    try:
        if not path.stat().st_size:
            raise EOFError("the file has 0 bytes")
        end = 0
        for number, line in enumerate(_lines(path, format_), start=1):
            end += len(line)
            try:
                if number == 1:
                    check_beginning(line, str(path))
                yield from _parse(source, line, f"{path}:{number}", end - len(line), _Place(path, line_number=number))
            except DataError as error:
                raise DataError(f"{error} {advice}") from error.__cause__
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as error:
        where = f"damaged or cut off after line {number}" if number else f"not {tool}, or damaged at its beginning"
        raise DataError(f"{path}: the compressed stream is {where}: {error}. {advice}") from error


class _ZstdError(Exception):
    """A zstd stream is cut off or damaged."""


class _Place:
    """Where a line is. Its number in a plain file is only counted when a message needs it."""

    def __init__(self, path: Path, offset: int | None = None, line_number: int | None = None) -> None:
        self._path, self.offset, self._line_number = path, offset, line_number

    def __str__(self) -> str:
        number = self._line_number
        if number is None:
            with open(self._path, "rb") as file:
                number = 1
                left = self.offset or 0
                while left and (block := file.read(min(left, 1 << 20))):
                    number += block.count(b"\n")
                    left -= len(block)
        return f"{self._path}, line {number}"


def _parse(
    source: FilesSource, line: bytes, document_id: str, start: int, place: _Place
) -> Iterator[Document | LeftOut]:
    """The document of one line; none for a blank line. Args: start: offset of the line in the decompressed file."""
    end = start + len(line)
    line = without_bom(line)
    if is_blank(line):
        return
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError:
        decoded_line = decode_utf8(line, source.invalid_utf8, str(place), place.offset)
        if decoded_line is None:
            yield LeftOut(document_id, "invalid_utf8")
            return
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
    text = mend_surrogates(text, source.invalid_utf8, str(place))
    yield LeftOut(document_id, "invalid_utf8") if text is None else Document(document_id, text, start, end)


def _lines(path: Path, format_: Literal["jsonl.gz", "jsonl.zst"]) -> Iterator[bytes]:
    if format_ == "jsonl.gz":
        with gzip.open(path, "rb") as file:
            yield from file
        return
    with open(path, "rb") as compressed:
        begun: list[bytes] = []  # blocks of a line whose end has not come yet
        for block in _zstd_blocks(compressed):
            first, *others = block.split(b"\n")
            begun.append(first)
            for begin_of_next in others:
                yield b"".join(begun)
                begun = [begin_of_next]
        if last := b"".join(begun):
            yield last


def _zstd_blocks(compressed: BinaryIO) -> Iterator[bytes]:
    """Decompressed blocks of all frames of a .zst file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        while block := compressed.read(_BLOCK_BYTES):
            while block:
                frame = frame or decompressor.decompressobj()
                text = frame.decompress(block)
                if text:
                    yield text
                block = b""
                if frame.eof:
                    block, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise _ZstdError(str(error)) from error
    if frame is not None:
        raise _ZstdError("it ends inside a frame")


def _shown(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
