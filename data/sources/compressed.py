"""Compressed files as text that can be entered anywhere.

A .zst file of several frames is entered at a frame, whose place and size its headers tell, or the table of the seekable
format. Else what lies before is
decompressed and thrown away, which is 20 (gzip) to 60 times (zstd) as quick as encoding it: cheap for few pieces.
A file behind a URL is one piece, as what is thrown away would be fetched as well.
"""

from __future__ import annotations

import gzip
import io
import mmap
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import zstandard

from data.sources.remote import AnyPath, RemoteFile, open_file

Compression = Literal["jsonl.gz", "jsonl.zst"]
RATIO = 3  # bytes of text per compressed byte, about
TO_THE_END = 1 << 62

_LEAST_BYTES = 8 << 20  # of text in a piece
_PIECES: dict[Compression, int] = {"jsonl.gz": 12, "jsonl.zst": 32}
"""The most pieces that are entered by throwing away: on average half of them are decompressed for each."""
_BLOCK_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20
_GZIP_WRAPS = 1 << 32  # its trailer tells the size modulo this
_ZSTD_MAGIC, _SKIPPABLE_MAGIC = 0xFD2FB528, 0x184D2A5
_SKIPPABLE_HEADER_BYTES = 8
_ZSTD_HEADER_BYTES = 18
_SEEK_FOOTER = struct.Struct("<IBI")  # number of frames, flags, magic
_SEEK_MAGIC, _SEEK_HAS_CHECKSUMS = 0x8F92EAB1, 0x80
_CONTENT_SIZE_UNKNOWN = (1 << 64) - 1


class ZstdError(Exception):
    """A zstd stream is cut off or damaged."""


DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, ZstdError)
"""What reading raises if the stream is cut off or damaged."""


class Entry(NamedTuple):
    """A place in a compressed file at which decompressing can begin, and how much text lies before it."""

    byte: int
    text_byte: int


class Piece(NamedTuple):
    """A stretch of the text, [start, end), about how long it is, and where to enter the file to read it."""

    start: int
    end: int
    num_bytes: int
    entry: Entry


def pieces(path: AnyPath, compression: Compression, piece_bytes: int) -> Iterator[Piece]:
    """Cut a file's text into pieces of about `piece_bytes`, or larger ones. The last reaches to the end, wherever."""
    size = path.stat().st_size
    least = max(piece_bytes, _LEAST_BYTES)
    entries = [Entry(0, 0)]
    num_bytes = largest = size * RATIO
    if num_bytes > least:
        if compression == "jsonl.zst" and (frames := _seek_table(path, size)):
            entries, num_bytes, largest = frames
        elif isinstance(path, RemoteFile):
            least = num_bytes  # one piece: it would be fetched again from its beginning for each
        elif compression == "jsonl.gz":
            num_bytes = largest = _gzip_text_bytes(path, size)
        else:
            entries, num_bytes, largest = _frames(path)
    step = max(least, -(-largest // _PIECES[compression]))
    if len(entries) == 1 and num_bytes < 2 * step:
        step = num_bytes or 1  # not worth decompressing most of it twice
    at = [entry.text_byte for entry in entries]
    for start in range(0, num_bytes or 1, step):
        is_last = start + step >= num_bytes
        entry = entries[bisect_right(at, max(start - 1, 0)) - 1]
        yield Piece(start, TO_THE_END if is_last else start + step, min(step, num_bytes - start), entry)


@contextmanager
def open_text(path: AnyPath, compression: Compression, entry: Entry, text_byte: int) -> Iterator[BinaryIO]:
    """The decompressed text from a byte on. Raises: DAMAGE: the stream is damaged; also when it is read."""
    with open_file(path) as file:
        file.seek(entry.byte)
        stream: BinaryIO
        if compression == "jsonl.gz":
            stream = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]  # a BufferedIOBase
        else:
            stream = io.BufferedReader(_ZstdText(file), _SKIP_BYTES)
        left = text_byte - entry.text_byte
        while left and (thrown_away := stream.read(min(left, _SKIP_BYTES))):
            left -= len(thrown_away)
        yield stream


def _gzip_text_bytes(path: Path, size: int) -> int:
    """About how much text a .gz file holds: what its end says, if that is likely."""
    with open(path, "rb") as file:
        file.seek(-4, io.SEEK_END)
        told = int.from_bytes(file.read(4), "little")
    told += round(max(size * RATIO - told, 0) / _GZIP_WRAPS) * _GZIP_WRAPS
    return told if told >= size else size * RATIO  # less: it tells the size of the last of several members


class _Frames(NamedTuple):
    entries: list[Entry]
    num_bytes: int
    largest: int


def _seek_table(path: AnyPath, size: int) -> _Frames | None:
    """What the table at the end of a file in the seekable format says; None if there is none."""
    with open_file(path) as file:
        file.seek(-min(_SEEK_FOOTER.size, size), io.SEEK_END)
        footer = file.read()
        if len(footer) < _SEEK_FOOTER.size:
            return None
        num_frames, flags, magic = _SEEK_FOOTER.unpack(footer)
        row = struct.Struct("<III" if flags & _SEEK_HAS_CHECKSUMS else "<II")
        table_bytes = num_frames * row.size + _SEEK_FOOTER.size
        if magic != _SEEK_MAGIC or not num_frames or table_bytes + _SKIPPABLE_HEADER_BYTES > size:
            return None
        file.seek(-table_bytes, io.SEEK_END)
        rows = list(row.iter_unpack(file.read(num_frames * row.size)))
    if sum(frame[0] for frame in rows) + _SKIPPABLE_HEADER_BYTES + table_bytes != size:
        return None
    ends = zip(accumulate(frame[0] for frame in rows), accumulate(frame[1] for frame in rows), strict=True)
    entries = [Entry(0, 0), *(Entry(*end) for end in ends)]
    return _Frames(entries[:-1], entries[-1].text_byte, max(frame[1] for frame in rows))


def _frames(path: Path) -> _Frames:
    """Frames with a known place in the text, about how much text there is, and the longest way between such frames."""
    entries: list[Entry] = []
    at = text_byte = largest = 0
    is_known = True
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at < len(data):
            end, content = _frame(data, at)
            if is_known:
                entries.append(Entry(at, text_byte))
            is_known = is_known and content is not None
            content = (end - at) * RATIO if content is None else content
            text_byte += content
            largest = max(largest, content)
            at = end
    unknown = text_byte - entries[-1].text_byte  # what is behind the last place that is known
    return _Frames(entries, text_byte, max(largest, unknown))


def _frame(data: mmap.mmap, at: int) -> tuple[int, int | None]:
    """Where the frame at a byte ends, and how much text it holds, if it says so. One that is damaged has no end."""
    magic = _uint(data, at, 4)
    if magic >> 4 == _SKIPPABLE_MAGIC:
        return min(at + _SKIPPABLE_HEADER_BYTES + _uint(data, at + 4, 4), len(data)), 0
    header = data[at : at + _ZSTD_HEADER_BYTES]
    try:
        if magic != _ZSTD_MAGIC:
            return len(data), None
        parameters, end = zstandard.get_frame_parameters(header), at + zstandard.frame_header_size(header)
    except zstandard.ZstdError:
        return len(data), None
    is_last = False
    while not is_last and end + 3 <= len(data):
        block = _uint(data, end, 3)
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        end += 3 + (1 if kind == 1 else size)  # 1: one byte, repeated
    end += 4 * parameters.has_checksum
    content = parameters.content_size
    return (min(end, len(data)), None if content == _CONTENT_SIZE_UNKNOWN else content)


def _uint(data: mmap.mmap, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


class _ZstdText(io.RawIOBase):
    """The text of all frames of a .zst file, from where it stands on."""

    def __init__(self, compressed: BinaryIO) -> None:
        self._blocks = _zstd_blocks(compressed)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # any buffer, as io asks
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _zstd_blocks(compressed: BinaryIO) -> Iterator[bytes]:
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
        raise ZstdError(str(error)) from error
    if frame is not None:
        raise ZstdError("it ends inside a frame")
