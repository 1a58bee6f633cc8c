"""Text to shards of token ids: slice by slice for training, then over slices for validation.

A slice's documents for training are packed as one stream (data/packers.py). The few for validation would end in a short
sample in every slice; so they are put aside, and those of consecutive slices are packed together.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.digest import digest_of
from data import held_out
from data.config import PackingFields
from data.filters.screening import NO_FILTERS, Screening
from data.held_out import HeldOutWriter, read_held_out
from data.id_sources import Vocabulary
from data.index import folder_name
from data.lineage import DocumentsWriter
from data.mds import BYTES, MdsWriter, array_of
from data.packers import PACKERS, Encoded, groups_of
from data.records import HeldOut, Packed, PackingFormat, Reason, SliceRecord, SliceRecords, SplitCounts
from data.sources import AnyDocument, Document, Slice, read_slice
from data.tokenizer import Tokenizer

_ENCODE_CHARS = 1 << 20  # documents are encoded together until they hold this much
_VALIDATION_SAMPLES = 256  # a validation stream holds about this many, and
_VALIDATION_SHARDS = 4


def columns_of(format_: PackingFormat) -> dict[str, str]:
    """The columns of a sample and how they are encoded. loss_mask: see Encoded."""
    mask = {"loss_mask": array_of("uint8")} if format_.has_loss_mask else {}
    return {"tokens": array_of(format_.token_dtype), "doc_starts": BYTES, **mask}


def write_slice(
    slice_: Slice,
    tokenizer: Tokenizer | None,
    fields: PackingFields,
    out_dir: Path,
    screening: Screening = NO_FILTERS,
) -> SliceRecord:
    """Tokenize a slice. Its documents for training become shards in out_dir/train/slice-NNNNN/.

    Those for validation go to out_dir/held_out/NNNNN.parquet. Both replace what is there.
    The same slice gives the same bytes.
    Args: tokenizer: of text; None if the source has ids of its own.
    Raises: DataError: the slice cannot be read; nothing of it is left behind.
    """
    format_ = _format(slice_.source.vocabulary, tokenizer, fields)
    folder, aside = out_dir / "train" / folder_name(slice_.index), out_dir / held_out.file_name(slice_.index)
    left_out: Counter[Reason] = Counter()
    with _replacing(folder, aside):
        writer = HeldOutWriter(aside, format_)
        splitter = _Splitter(fields.validation_fraction, writer)
        kept = screening.kept(read_slice(slice_, left_out), slice_.index, left_out)
        documents = splitter.for_training(_encoded(kept, tokenizer))
        train = _write_stream(documents, format_, fields, folder)
        put_aside = writer.finish()
    return SliceRecord(
        index=slice_.index,
        format=format_,
        left_out=dict(left_out),
        positions=splitter.positions,
        train=train,
        held_out=put_aside,
    )


class ValidationStream(NamedTuple):
    """Consecutive slices whose documents for validation are packed as one stream.

    number: of the stream.
    slices: numbers of the slices, and what each has put aside.
    sha256: digest of that; a stream that was written from other slices has another one.
    """

    number: int
    format: PackingFormat
    slices: tuple[tuple[int, HeldOut], ...]
    sha256: str


def plan_validation(records: SliceRecords, fields: PackingFields) -> list[ValidationStream]:
    """Cut the documents put aside by all slices into streams. The same records give the same streams.

    Each holds enough samples that its short last one does not count, and no more than a task does in a while.
    """
    found = [
        _Waiting(record.index, record.source_stamp, record.held_out)
        for record in records
        if record.held_out is not None
    ]
    if not found:
        return []
    format_ = next(iter(records)).format
    shard_tokens = fields.shard_bytes // np.dtype(format_.token_dtype).itemsize
    enough = max(_VALIDATION_SAMPLES * fields.seq_len, _VALIDATION_SHARDS * shard_tokens)
    last = max(sum(waiting.held_out.num_tokens for waiting in found) // enough, 1) - 1
    groups: dict[int, list[_Waiting]] = {}
    before = 0
    for waiting in found:
        groups.setdefault(min(before // enough, last), []).append(waiting)
        before += waiting.held_out.num_tokens
    return [
        ValidationStream(
            number,
            format_,
            tuple((waiting.slice_index, waiting.held_out) for waiting in group),
            digest_of(f"{waiting.source_stamp} {waiting.slice_index} {waiting.held_out.sha256}" for waiting in group),
        )
        for number, group in enumerate(groups.values())
    ]


def write_validation(
    stream: ValidationStream, files: Mapping[int, Path], fields: PackingFields, out_dir: Path
) -> Packed:
    """Pack a validation stream into shards in out_dir/valid/slice-NNNNN/, replacing what is there.

    Args: files: what each slice has put aside, by its number.
    Raises: DamagedError: such a file is missing or not as it was written.
    """
    folder = out_dir / "valid" / folder_name(stream.number)
    with _replacing(folder):
        documents = (document for number, found in stream.slices for document in read_held_out(files[number], found))
        packed = _write_stream(documents, stream.format, fields, folder)
    assert packed is not None
    return packed


def position_of(raw: bytes) -> float:
    """Where in [0, 1) the hash of a text puts it: the same for equal texts, wherever they stand.

    Texts below validation_fraction are for validation.
    """
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


class _Waiting(NamedTuple):
    """What a slice has put aside."""

    slice_index: int
    source_stamp: str
    held_out: HeldOut


class _Splitter:
    """Hands documents for training on and puts those for validation aside."""

    def __init__(self, validation_fraction: float, aside: HeldOutWriter) -> None:
        self._validation_fraction, self._aside = validation_fraction, aside
        self._least, self._greatest = 1.0, 0.0

    @property
    def positions(self) -> tuple[float, float] | None:
        """The least and the greatest of the documents; None if there was none."""
        return (self._least, self._greatest) if self._least <= self._greatest else None

    def for_training(self, documents: Iterable[tuple[Encoded, float]]) -> Iterator[Encoded]:
        """Documents for training. Args: documents: each with its position_of."""
        for document, position in documents:
            self._least, self._greatest = min(self._least, position), max(self._greatest, position)
            if position < self._validation_fraction:
                self._aside.add(document)
            else:
                yield document


def _format(own: Vocabulary | None, tokenizer: Tokenizer | None, fields: PackingFields) -> PackingFormat:
    """Args: own: the source's own ids; None: those of the tokenizer."""
    if own is None:
        assert tokenizer is not None, "text needs a tokenizer"
        own = Vocabulary(tokenizer.vocab_size, tokenizer.eod_id)
    return PackingFormat(
        seq_len=fields.seq_len,
        eod_id=own.eod_id,
        vocab_size=own.size,
        token_dtype="uint16" if own.size <= 1 << 16 else "uint32",
        tokenizer_sha256=tokenizer.sha256 if tokenizer is not None else None,
        has_loss_mask=own.has_loss_mask,
    )


def _encoded(documents: Iterable[AnyDocument], tokenizer: Tokenizer | None) -> Iterator[tuple[Encoded, float]]:
    """Documents with their own ids or those of their text, each with its position_of."""
    for batch in groups_of(documents, _ENCODE_CHARS, lambda document: document.size):
        texts = [document.text for document in batch if isinstance(document, Document)]
        ids_of = iter(tokenizer.encode_batch(texts) if tokenizer is not None and texts else [])
        del texts
        yield from map(_with_ids, batch, (next(ids_of) if isinstance(one, Document) else one.ids for one in batch))


def _with_ids(document: AnyDocument, ids: np.ndarray) -> tuple[Encoded, float]:
    raw = document.raw
    if isinstance(document, Document):
        num_bytes, mask = len(raw), None
    else:
        num_bytes, mask = document.num_bytes, document.loss_mask
    return Encoded(document.id, document.start, document.end, num_bytes, ids, mask), position_of(raw)


def _write_stream(
    documents: Iterator[Encoded], format_: PackingFormat, fields: PackingFields, folder: Path
) -> Packed | None:
    """Pack documents into shards and the table of them. Returns None, and writes nothing, if there are none."""
    seq_len = format_.seq_len
    eod = np.array([format_.eod_id], format_.token_dtype)
    shards = MdsWriter(folder, columns_of(format_), fields.shard_bytes)
    table = DocumentsWriter(folder)
    num_documents = num_samples = num_tokens = num_bytes = num_cut = 0
    for block in PACKERS[fields.packing](documents, seq_len, eod):
        for sample in block.samples:
            mask = {"loss_mask": sample.loss_mask} if format_.has_loss_mask else {}
            shards.write({"tokens": sample.tokens, "doc_starts": sample.doc_starts.tobytes(), **mask})
        table.add(block.documents)
        num_samples += len(block.samples)
        num_documents += len(block.documents)
        for document, position in block.documents:
            num_tokens += document.num_targets
            num_bytes += document.num_bytes
            num_cut += position // seq_len != (position + document.num_targets - 1) // seq_len
    if not num_documents:
        return None
    counts = SplitCounts(
        num_documents=num_documents,
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_cut_documents=num_cut,
    )
    return Packed(counts=counts, shards=shards.finish(), documents_sha256=table.finish().sha256)


@contextmanager
def _replacing(*paths: Path) -> Iterator[None]:
    """Remove files and folders before they are written again, and what was written if that fails."""

    def remove() -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    remove()
    try:
        yield
    except BaseException:
        remove()
        raise
