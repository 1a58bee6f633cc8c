"""Text files on a disk, read as streams; data.config.FORMAT_OF_SUFFIX says which formats there are."""

from __future__ import annotations

from collections.abc import Iterator

from data.config import FORMAT_OF_SUFFIX, FileFormat, FilesSource
from data.errors import DataError
from data.sources import compressed, jsonl, parquet
from data.sources.digests import identity_of
from data.sources.document import (
    Document,
    LeftOut,
    Part,
    check_beginning,
    check_unchanged,
    decode_utf8,
    reading,
    without_bom,
)
from data.sources.named import Found, find_files
from data.sources.remote import AnyPath, open_file, path_of

_LOOK_AHEAD_BYTES = 64 << 10  # how far past a cut a line end is looked for


def content_identity(source: FilesSource) -> str:
    """Digest of the names and contents of the files."""
    return identity_of(find(source).paths)


def text_bytes(source: FilesSource) -> int:
    """About how much text the files hold, by their sizes."""
    return sum(
        path.stat().st_size * (1 if _format(path) in ("txt", "jsonl") else compressed.RATIO)
        for path in find(source).paths
    )


def paths(source: FilesSource) -> list[AnyPath]:
    """The files it reads."""
    return list(find(source).paths)


def plan_parts(source: FilesSource, slice_bytes: int) -> Iterator[Part]:
    """Pieces of the files, in order: no larger than a slice where the format can be entered in the middle."""
    for path in find(source).paths:
        size = path.stat().st_size
        match _format(path):
            case "parquet":
                with reading(path):
                    groups = parquet.row_group_bytes(path, source.text_field)
                for group, num_bytes in enumerate(groups):
                    yield Part(str(path), group, group + 1, num_bytes, size)
            case "jsonl":
                yield from _cut(path, size, slice_bytes)
            case "txt":
                yield from _cut(path, size, source.max_txt_document_bytes)
            case "jsonl.gz" | "jsonl.zst" as compression:
                with reading(path):
                    for piece in compressed.pieces(path, compression, slice_bytes):
                        yield Part(str(path), piece.start, piece.end, piece.num_bytes, size, piece.entry)


def read_part(source: FilesSource, part: Part) -> Iterator[Document | LeftOut]:
    """The documents of one part.

    Raises: DataError: the file is gone, changed, damaged, or a document in it is not text.
    """
    path = path_of(part.path)
    check_unchanged(part)
    with reading(path):
        match _format(path):
            case "parquet":
                yield from parquet.read_row_groups(source, path, range(part.start, part.end))
            case "txt":
                yield from _read_txt(source, path, part)
            case "jsonl":
                yield from jsonl.read_range(source, path, part.start, part.end)
            case "jsonl.gz" | "jsonl.zst" as compression:
                entry = compressed.Entry(*part.entry)
                yield from jsonl.read_compressed(source, path, compression, part.start, part.end, entry)


def _cut(path: AnyPath, size: int, step: int) -> Iterator[Part]:
    for start in range(0, size or 1, step):  # an empty file is a part too: an empty document, if it is a .txt
        end = min(start + step, size)
        yield Part(str(path), start, end, end - start, size)


def _read_txt(source: FilesSource, path: AnyPath, part: Part) -> Iterator[Document | LeftOut]:
    with open_file(path) as file:
        start, end = _txt_boundary(file, part.start, part.file_bytes), _txt_boundary(file, part.end, part.file_bytes)
        file.seek(start)
        raw = file.read(end - start)
    is_whole = part.start == 0 and part.end == part.file_bytes
    if not raw and not is_whole:
        return  # inside a line that another part has
    where = str(path) if is_whole else f"{path}, bytes {start} to {end}"
    if start == 0:
        check_beginning(raw, str(path))
        raw = without_bom(raw)
    first_byte = end - len(raw)
    name = str(path) if is_whole else f"{path}:{start}"
    text = decode_utf8(raw, source.invalid_utf8, where, first_byte)
    yield LeftOut(name, "invalid_utf8") if text is None else Document(name, text, start, end)


def _txt_boundary(file, offset: int, size: int) -> int:  # type: ignore[no-untyped-def]  # a binary file
    """Where the cut near `offset` falls: behind the next line end, or, none being near, before the next character."""
    if offset in (0, size):
        return offset
    file.seek(offset - 1)
    block = file.read(_LOOK_AHEAD_BYTES)
    line_end = block.find(b"\n")
    if line_end >= 0:
        return offset + line_end
    inside_character = next((i for i, byte in enumerate(block[1:5]) if byte & 0xC0 != 0x80), len(block[1:5]))
    return offset + inside_character


def find(source: FilesSource) -> Found:
    """The files a source names. Raises DataError: one is missing, no file, of an unknown format, or all are empty."""
    return find_files(source.paths, _format, f"*.jsonl; formats: {', '.join(FORMAT_OF_SUFFIX)}")


def _format(path: AnyPath) -> FileFormat:
    name = path.name.lower()
    for suffix, format_ in FORMAT_OF_SUFFIX.items():
        if name.endswith(suffix):
            return format_
    raise DataError(
        f"source.paths: {path}: cannot tell the format from the name. Expected one of {', '.join(FORMAT_OF_SUFFIX)}: "
        "rename or convert the file."
    )
