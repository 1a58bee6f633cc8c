"""Where documents come from: text, token ids or bytes of files, a Hugging Face data set, made up for a task, ...

Work is split by bytes, not by documents or files: `plan_slices` cuts a source into slices of about equal size, each of
which any process reads alone with `read_slice`, in bounded memory (one document at a time).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from data.config import (
    MIB,
    BytesSource,
    FilesSource,
    HuggingFaceSource,
    PythonStdlibSource,
    Source,
    SyntheticSource,
    TokenizeFields,
    TokensSource,
)
from data.paths import expanded
from data.records import Reason
from data.sources import python_stdlib
from data.sources.digests import stamp_of
from data.sources.document import AnyDocument, Document, LeftOut, Part, Slice, TokenDocument
from data.sources.remote import is_url

__all__ = [
    "AnyDocument",
    "Document",
    "Part",
    "Slice",
    "TokenDocument",
    "content_identity",
    "duplicate_files",
    "local_paths",
    "plan_slices",
    "read_slice",
    "slice_bytes_of",
    "with_absolute_paths",
]

_OF_PATHS = FilesSource | TokensSource | BytesSource
_SLICES = 128  # of a source of some size: enough for as many workers
_FEWEST_SLICE_BYTES = 8 * MIB
_MOST_SLICE_BYTES = 512 * MIB  # fills a few shards
_SLICE_BYTES_PER_TOKEN = 256  # of seq_len: some 64 samples, so that the short last one does not count


def with_absolute_paths(source: Source) -> Source:
    """The same source for a process that may have another working directory."""
    match source:
        case FilesSource() | TokensSource() | BytesSource():
            return source.model_copy(update={"paths": tuple(_absolute(path) for path in source.paths)})
        case HuggingFaceSource() if _reader_of(source).local_folder(source):
            return source.model_copy(update={"dataset": _absolute(source.dataset)})
    return source


def local_paths(source: Source) -> tuple[str, ...]:
    """The files and folders of this machine that the source names, as they are written, also with wildcards."""
    match source:
        case FilesSource() | TokensSource() | BytesSource():
            return tuple(path for path in source.paths if not is_url(path))
        case HuggingFaceSource() if _reader_of(source).local_folder(source):
            return (source.dataset,)
    return ()


def content_identity(source: Source) -> str:
    """Digest of the names and contents of what the source reads now.

    Raises: DataError: something the source names is missing, empty or of an unknown format.
    """
    return _reader_of(source).content_identity(source)


def stamp(source: Source) -> str:
    """Digest of the names, sizes, inodes and times of the source's files: equal as long as nobody touches them.

    Quick, other than content_identity, and different on another machine; "" if the source has no files of its own.
    """
    return stamp_of(_reader_of(source).paths(source))


def slice_bytes_of(fields: TokenizeFields) -> int:
    """Text per slice, about: slice_bytes, or by default what follows from the source and seq_len alone."""
    if fields.slice_bytes is not None:
        return fields.slice_bytes
    text_bytes: int = _reader_of(fields.source).text_bytes(fields.source)
    fewest = max(_FEWEST_SLICE_BYTES, _SLICE_BYTES_PER_TOKEN * fields.seq_len)
    return max(min(text_bytes // _SLICES, _MOST_SLICE_BYTES), fewest)


def plan_slices(source: Source, slice_bytes: int) -> list[Slice]:
    """Cut the source into slices of about `slice_bytes` each. The same source gives the same slices.

    Every file is spread over slices: .txt by piece, .jsonl by line, .parquet by row group. A compressed .jsonl of some
    size is too, a .zst file of many frames into any number, one that can only be entered at its beginning into few.
    Raises: DataError: as content_identity.
    """
    settings = source.model_copy(update={"paths": ()}) if isinstance(source, _OF_PATHS) else source
    slices: list[Slice] = []
    parts: list[Part] = []
    num_bytes = 0
    for part in _reader_of(source).plan_parts(source, slice_bytes):
        if parts and num_bytes + part.num_bytes > slice_bytes:
            slices.append(Slice(len(slices), settings, tuple(parts)))
            parts, num_bytes = [], 0
        parts.append(part)
        num_bytes += part.num_bytes
    if parts:
        slices.append(Slice(len(slices), settings, tuple(parts)))
    return slices


def duplicate_files(source: Source) -> list[str]:
    """Names in the source that lead to a file that another name leads to already; each file is read once."""
    if not isinstance(source, _OF_PATHS):
        return []
    return [str(path) for path in _reader_of(source).find(source).duplicates]


def read_slice(slice_: Slice, left_out: Counter[Reason] | None = None) -> Iterator[AnyDocument]:
    """The documents of a slice, in order, empty ones left out.

    Args: left_out: counts, by reason, the documents that are not handed on.
    Raises: DataError: a file is damaged, changed since the plan was made, or holds what cannot be text.
    """
    reader = _reader_of(slice_.source)
    for part in slice_.parts:
        for found in reader.read_part(slice_.source, part):
            if not isinstance(found, LeftOut) and found.size:
                yield found
            elif left_out is not None:
                left_out[found.reason if isinstance(found, LeftOut) else "empty"] += 1


def _absolute(path: str) -> str:
    return path if is_url(path) else str(expanded(path).absolute())


def _reader_of(source: Source):  # type: ignore[no-untyped-def]  # a module with the functions called above
    from data.sources import files, huggingface, raw_bytes, synthetic, tokens

    match source:
        case FilesSource():
            return files
        case HuggingFaceSource():
            return huggingface
        case PythonStdlibSource():
            return python_stdlib
        case TokensSource():
            return tokens
        case BytesSource():
            return raw_bytes
        case SyntheticSource():
            return synthetic
