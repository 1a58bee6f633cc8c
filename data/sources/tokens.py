"""Files of token ids, mapped into memory and read a stretch at a time.

What a file is, its content says: `\\x93NUMPY` begins an array of numpy, `MMIDIDX` the index of Megatron-LM beside its
ids. All else is ids and nothing else, as nanoGPT and OLMo-core write them, the latter also under the name .npy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.config import TokensSource
from data.errors import DataError
from data.sources.digests import identity_of
from data.sources.document import LeftOut, Part, TokenDocument, check_unchanged, reading
from data.sources.named import Found, find_files
from data.sources.remote import is_url

_SCANNED = 1 << 20  # ids looked through at once for the ends of documents
_NUMPY, _MEGATRON = b"\x93NUMPY", b"MMIDIDX\0\0"
_MEGATRON_HEAD = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("num_sequences", "<u8"), ("num_documents", "<u8")]
)
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def content_identity(source: TokensSource) -> str:
    """Digest of the names and contents of the files."""
    return identity_of(paths(source))


def text_bytes(source: TokensSource) -> int:
    """Size of the files, which is about that of the text or less."""
    return sum(path.stat().st_size for path in _files(source))


def paths(source: TokensSource) -> list[Path]:
    """The files it reads, the indexes of Megatron-LM among them."""
    return [path for data in _files(source) for path in (data, _index_file(data)) if path is not None]


def find(source: TokensSource) -> Found:
    """The files that a source names. Raises DataError: one is missing or no file, or all are empty."""
    url = next(filter(is_url, source.paths), None)
    if url is not None:
        raise DataError(
            f"source.paths: {url} is a URL. Files of token ids are mapped into memory: copy them to where every "
            "machine sees them at the same path."
        )
    return find_files(source.paths, lambda path: None, "*.bin")


def plan_parts(source: TokensSource, slice_bytes: int) -> Iterator[Part]:
    """Pieces of the files, in order, of about slice_bytes."""
    for path in _files(source):
        with reading(path):
            ids = _open(source, path)
        num_bytes = path.stat().st_size
        step = _step(source, ids, slice_bytes)
        for start in range(0, ids.length, step):
            end = min(start + step, ids.length)
            yield Part(str(path), start, end, num_bytes * (end - start) // ids.length, num_bytes)


def read_part(source: TokensSource, part: Part) -> Iterator[TokenDocument | LeftOut]:
    """The documents that begin in one part. Raises DataError: the file has changed, or holds an id there is not."""
    check_unchanged(part)
    path = Path(part.path)
    with reading(path):
        ids = _open(source, path)
        first_byte, size = int(getattr(ids.ids, "offset", 0)), ids.ids.itemsize
        for begin, end in ids.documents(part.start, part.end, source.eod_id, source.document_tokens):
            document = ids.ids[begin:end]
            _check_ids(document, source, f"{path}, id {begin}")
            yield TokenDocument(f"{path}:{begin}", document, first_byte + begin * size, first_byte + end * size)


def _files(source: TokensSource) -> list[Path]:
    """Those that hold ids."""
    found = (path for path in find(source).paths if isinstance(path, Path))
    return [path for path in found if not _is_index_of_another(path)]


class _Stream:
    """Ids one after another. `length` counts ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.length = ids, len(ids)

    def documents(self, start: int, end: int, eod_id: int | None, limit: int) -> Iterator[tuple[int, int]]:
        """Begin and end of the documents that begin from `start` to `end`, exclusive, cut to `limit` ids."""
        stretches = iter([(start, end)]) if eod_id is None else _between(self.ids, start, end, eod_id)
        for begin, stop in stretches:
            for first in range(begin, stop, limit):
                yield first, min(first + limit, stop)


@dataclass(frozen=True)
class _Rows:
    """Documents of known extent. `length` counts documents."""

    ids: np.ndarray
    length: int
    bounds: Callable[[int], tuple[int, int]]  # begin and end of one of them

    def documents(self, start: int, end: int, eod_id: int | None, limit: int) -> Iterator[tuple[int, int]]:
        """Begin and end in ids of the documents `start` to `end`, cut at ends of documents in them and to `limit`."""
        for number in range(start, end):
            first, stop = self.bounds(number)
            whole = _Stream(self.ids[first:stop])
            for begin, end_ in whole.documents(0, whole.length, eod_id, limit):
                yield first + begin, first + end_


def _between(ids: np.ndarray, start: int, end: int, eod_id: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what stands between ends of documents and begins from `start` to `end`; nothing empty."""
    begun = 0 if start == 0 else None
    position = max(start - 1, 0)  # an end of a document just before `start` begins one there
    while position < len(ids) and (begun is not None or position < end):
        block = ids[position : position + _SCANNED]
        for at in (np.flatnonzero(block == eod_id) + position).tolist():
            if begun is not None and begun < at:
                yield begun, at
            begun = at + 1
            if begun >= end:
                return
        position += len(block)
    if begun is not None and begun < len(ids):
        yield begun, len(ids)


def _step(source: TokensSource, ids: _Stream | _Rows, slice_bytes: int) -> int:
    """How much of a file one part takes: whole documents where their extent is known."""
    mean_bytes = ids.ids.nbytes / max(ids.length, 1)
    step = max(int(slice_bytes / max(mean_bytes, 1)), 1)
    if isinstance(ids, _Stream) and source.eod_id is None:
        step = max(step // source.document_tokens, 1) * source.document_tokens
    return step


def _open(source: TokensSource, path: Path) -> _Stream | _Rows:
    """The ids of a file, mapped into memory. Raises DataError: it is not as such files are."""
    if not path.stat().st_size:
        return _Stream(np.empty(0, np.uint8))
    if (index := _index_file(path)) is not None:
        return _open_megatron(path, index)
    with open(path, "rb") as file:
        beginning = file.read(len(_NUMPY))
    if beginning == _NUMPY:
        return _open_numpy(path)
    dtype = np.dtype(source.dtype).newbyteorder("<")
    if path.stat().st_size % dtype.itemsize:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes are no whole number of ids of type {source.dtype}. Set source.dtype "
            "to the type that the file was written with, or fetch it again."
        )
    return _Stream(np.memmap(path, dtype, "r"))


def _open_numpy(path: Path) -> _Stream | _Rows:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a whole array of numpy: {error}. Fetch or write the file again.") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise DataError(
            f"{path}: an array of {ids.dtype} of {ids.ndim} dimensions, expected integers of one dimension, or of two "
            "with a document in each row. Write it again so."
        )
    if ids.ndim == 1:
        return _Stream(ids)
    if not ids.flags.c_contiguous:
        raise DataError(f"{path}: stored column by column. Write it again with np.ascontiguousarray.")
    num_rows, length = ids.shape
    return _Rows(ids.reshape(-1), num_rows, lambda row: (row * length, (row + 1) * length))


def _open_megatron(path: Path, index: Path) -> _Rows:
    head = np.fromfile(index, _MEGATRON_HEAD, 1)[0]
    dtype = _MEGATRON_DTYPES.get(int(head["dtype"]))
    num_sequences, num_documents = int(head["num_sequences"]), int(head["num_documents"])
    # Behind the head: lengths of sequences, their places in bytes, each document's first sequence, one after the last.
    needed = _MEGATRON_HEAD.itemsize + 12 * num_sequences + 8 * num_documents
    if head["version"] != 1 or dtype is None or index.stat().st_size < needed or not num_sequences or not num_documents:
        raise DataError(
            f"{index}: not a whole index of Megatron-LM of version 1 with ids of integers. Fetch or write it again."
        )
    at = _MEGATRON_HEAD.itemsize
    lengths = np.memmap(index, "<i4", "r", at, (num_sequences,))
    places = np.memmap(index, "<i8", "r", at + 4 * num_sequences, (num_sequences,))
    firsts = np.memmap(index, "<i8", "r", at + 12 * num_sequences, (num_documents,))
    ids = np.memmap(path, dtype, "r")

    def bounds(document: int) -> tuple[int, int]:
        first, end = firsts[document : document + 2].tolist()
        if first == end:
            return 0, 0
        begin, stop = int(places[first]), int(places[end - 1]) + int(lengths[end - 1]) * ids.itemsize
        if not (0 <= begin <= stop <= ids.nbytes) or stop - begin != int(lengths[first:end].sum()) * ids.itemsize:
            raise DataError(
                f"{path}: document {document} is not where {index.name} beside it says. The two do not belong "
                "together, or one is cut off: fetch both again."
            )
        return begin // ids.itemsize, stop // ids.itemsize

    return _Rows(ids, num_documents - 1, bounds)


def _index_file(path: Path) -> Path | None:
    """The index of Megatron-LM beside a file of ids."""
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return None
    with open(index, "rb") as file:
        return index if file.read(len(_MEGATRON)) == _MEGATRON else None


def _is_index_of_another(path: Path) -> bool:
    return path.suffix == ".idx" and _index_file(path.with_suffix(".bin")) == path


def _check_ids(ids: np.ndarray, source: TokensSource, where: str) -> None:
    least, greatest = int(ids.min()), int(ids.max())
    if least < 0 or greatest >= source.vocab_size:
        wrong = least if least < 0 else greatest
        raise DataError(
            f"{where}: it holds id {wrong}, expected 0 to {source.vocab_size - 1} (source.vocab_size). Set "
            "source.vocab_size and source.dtype to what the file was written with."
        )
