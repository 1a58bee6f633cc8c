"""Token ids of documents packed into sequences of equal length and written as MDS shards.

A slice's documents A, B, ... make one stream, each behind an end-of-document token (eod), one more at the very end:

    eod A1 A2 A3 eod B1 B2 eod

The stream is cut into samples of seq_len + 1 tokens, each overlapping the next by one: all tokens of a sample but the
last are inputs, all but the first are targets. Beside the tokens stand the offsets of its eods, where documents start.
So every token of every document is a target exactly once, and so is each document's end; eod also is what a document's
first token is predicted from. Why so: docs/design/0010-documents-in-packed-sequences.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from base.sealed import dumps
from data.config import TokenizeFields
from data.errors import DataError
from data.index import TABLE_FILE, folder_name, pack_index
from data.mds import BYTES, MdsWriter, array_of, index_entry
from data.records import (
    NOTHING,
    SPLITS,
    PackingFormat,
    Reason,
    ShardEntry,
    ShardsSummary,
    SliceRecord,
    Split,
    SplitCounts,
)
from data.sources import Document, Slice, read_slice
from data.tokenizer import Tokenizer

INDEX_FILE = "index.json"  # for mosaicml-streaming and what reads its format; ours is TABLE_FILE
DOC_STARTS_DTYPE = np.dtype("<i4")  # stored as bytes: MDS has no empty arrays, and a sample may begin no document
_ENCODE_CHARS = 1 << 20  # documents are encoded together until they hold this much
_SAMPLES_AT_ONCE = 64


def columns_of(format_: PackingFormat) -> dict[str, str]:
    """The columns of a sample and how they are encoded."""
    return {"tokens": array_of(format_.token_dtype), "doc_starts": BYTES}


def write_slice(slice_: Slice, tokenizer: Tokenizer, fields: TokenizeFields, out_dir: Path) -> SliceRecord:
    """Tokenize a slice and write its shards to out_dir/{train,valid}/slice-NNNNN/, replacing what is there.

    The same slice gives the same bytes. A split that gets no document gets no folder.
    Raises: DataError: the slice cannot be read as text; nothing of it is left behind.
    """
    folders = {split: out_dir / split / folder_name(slice_.index) for split in SPLITS}
    format_ = PackingFormat(
        seq_len=fields.seq_len,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        token_dtype="uint16" if tokenizer.dtype is np.uint16 else "uint32",
        tokenizer_sha256=tokenizer.sha256,
    )
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    writers = {split: _SplitWriter(folder, format_, fields.shard_bytes) for split, folder in folders.items()}
    left_out: Counter[Reason] = Counter()
    least, greatest = 1.0, 0.0
    try:
        for documents in _batches(read_slice(slice_, left_out)):
            ids_of = tokenizer.encode_batch([document.text for document in documents])
            for document, ids in zip(documents, ids_of, strict=True):
                raw = document.text.encode("utf-8")
                position = position_of(raw)
                least, greatest = min(least, position), max(greatest, position)
                split: Split = "valid" if position < fields.validation_fraction else "train"
                writers[split].add(ids, len(raw))
        shards = {split: writer.finish() for split, writer in writers.items()}
    except BaseException:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    counts = {split: writer.counts for split, writer in writers.items()}
    return SliceRecord(
        index=slice_.index,
        format=format_,
        counts=counts,
        left_out=dict(left_out),
        positions=(least, greatest) if least <= greatest else None,
        shards=shards,
    )


def merge_slices(out_dir: Path, records: Sequence[SliceRecord], fields: TokenizeFields) -> ShardsSummary:
    """Write {train,valid}/index.json over all slices in their order. Only then are the shards a data set.

    Only the records are read, so the shards may be on other machines. A split without documents gets no index.
    Raises: DataError: no document at all, or none for a split that should have some.
    """
    records = sorted(records, key=lambda record: record.index)
    counts = {split: sum((record.counts[split] for record in records), NOTHING) for split in SPLITS}
    _check_not_empty(counts, [record.positions for record in records if record.positions], fields)
    format_ = records[0].format
    other = next((record for record in records if record.format != format_), None)
    if other is not None:
        raise DataError(
            f"slices {records[0].index} and {other.index} in {out_dir} were written with different tokenizers or "
            f"lengths: {format_} and {other.format}. Delete the tokenize stage's artifact and run it again."
        )
    digests: dict[Split, str] = {}
    for split in SPLITS:
        if counts[split].num_samples:
            shards = [(record.index, shard) for record in records for shard in record.shards[split]]
            _write_index(out_dir / split, format_, shards, fields.shard_bytes)
            data = pack_index(format_, counts[split], shards)
            _write_atomic(out_dir / split / TABLE_FILE, data)
            digests[split] = hashlib.sha256(data).hexdigest()
    left_out = sum((Counter(record.left_out) for record in records), Counter())
    return ShardsSummary(format=format_, counts=counts, left_out=dict(left_out), index_sha256=digests)


def _write_index(
    folder: Path, format_: PackingFormat, shards: Sequence[tuple[int, ShardEntry]], shard_bytes: int
) -> None:
    columns = columns_of(format_)
    entries = [
        index_entry(shard._replace(name=f"{folder_name(number)}/{shard.name}"), columns, shard_bytes)
        for number, shard in shards
    ]
    _write_atomic(folder / INDEX_FILE, dumps({"version": 2, "shards": entries}, sort_keys=True).encode())


class _SplitWriter:
    """Packs documents into samples and writes them as the shards of one slice and split."""

    def __init__(self, folder: Path, format_: PackingFormat, shard_bytes: int) -> None:
        self._format = format_
        self._eod = np.array([format_.eod_id], format_.token_dtype)
        self._pending: list[np.ndarray] = []  # the stream from the first token of the next sample on
        self._num_pending = 0
        self._writer = MdsWriter(folder, columns_of(format_), shard_bytes)
        self.counts = NOTHING

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append one document: its token ids and the UTF-8 bytes of its text."""
        self._append(self._eod)
        self._append(ids.astype(self._format.token_dtype))
        self.counts += SplitCounts(num_documents=1, num_samples=0, num_tokens=len(ids) + 1, num_bytes=num_bytes)
        if self._num_pending > _SAMPLES_AT_ONCE * self._format.seq_len:
            self._write_samples(is_end=False)

    def finish(self) -> tuple[ShardEntry, ...]:
        """Write what is left. Returns the entries of the shards, relative to the folder."""
        if not self.counts.num_documents:
            return ()
        self._append(self._eod)
        self._write_samples(is_end=True)
        return self._writer.finish()

    def _append(self, tokens: np.ndarray) -> None:
        self._pending.append(tokens)
        self._num_pending += len(tokens)

    def _write_samples(self, is_end: bool) -> None:
        """Write the samples that are complete, at the end also the shorter last one."""
        seq_len = self._format.seq_len
        tokens = np.concatenate(self._pending)
        num_samples = -(-(len(tokens) - 1) // seq_len) if is_end else (len(tokens) - 1) // seq_len
        doc_starts = np.flatnonzero(tokens == self._eod)
        for start in range(0, num_samples * seq_len, seq_len):
            end = min(start + seq_len + 1, len(tokens))
            low, high = np.searchsorted(doc_starts, (start, end))
            offsets = (doc_starts[low:high] - start).astype(DOC_STARTS_DTYPE)
            self._writer.write({"tokens": tokens[start:end], "doc_starts": offsets.tobytes()})
        self.counts += SplitCounts(num_documents=0, num_samples=num_samples, num_tokens=0, num_bytes=0)
        self._pending = [tokens[num_samples * seq_len :]]
        self._num_pending = len(self._pending[0])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _ENCODE_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def position_of(raw: bytes) -> float:
    """Where in [0, 1) the hash of a text puts it: the same for equal texts, wherever they stand.

    Texts below validation_fraction are for validation.
    """
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def _check_not_empty(
    counts: dict[Split, SplitCounts], positions: Sequence[tuple[float, float]], fields: TokenizeFields
) -> None:
    num_documents = sum(count.num_documents for count in counts.values())
    if not num_documents:
        raise DataError("source: empty corpus: no document holds any text. Name files with text in them.")
    missing: Split = "valid" if counts["train"].num_documents else "train"
    if counts[missing].num_documents or (missing == "valid" and fields.validation_fraction == 0):
        return
    least, greatest = min(low for low, _ in positions), max(high for _, high in positions)
    found = f"source: none of the {num_documents:,} documents went to the {missing} split"
    if num_documents > 1 and least == greatest:
        raise DataError(
            f"{found}: all hold the same text, and equal texts go to the same split, whatever validation_fraction is. "
            "Give documents that differ, or set validation_fraction to 0 to do without validation."
        )
    enough = _fraction_between(least, greatest, nearest_to_least=missing == "valid")
    advice = "0 to do without validation" if enough is None else f"{enough:g}, which splits these documents"
    raise DataError(
        f"{found} (validation_fraction={fields.validation_fraction}, decided by the hash of each text). Set "
        f"validation_fraction to {advice}, or give more documents that differ: one .txt file is one document unless "
        "longer than source.max_txt_document_bytes."
    )


def _fraction_between(least: float, greatest: float, nearest_to_least: bool) -> float | None:
    """A short number f with least < f <= greatest, near one of them; None if they are too close to each other."""
    near = max(least if nearest_to_least else greatest, 1e-9)
    for digits in range(2, 6):
        unit = 10.0 ** (math.floor(math.log10(near)) + 1 - digits)
        fraction = float(f"{(math.floor(near / unit) + nearest_to_least) * unit:g}")
        if least < fraction <= greatest:
            return fraction
    return None


def _write_atomic(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
