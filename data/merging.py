"""Records of slices and validation streams put together: the indexes that make a data set of the shards."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from base.sealed import dumps
from data.config import PackingFields
from data.errors import DataError
from data.index import TABLE_FILE, folder_name, pack_index
from data.mds import index_entry
from data.packing import columns_of
from data.records import (
    NOTHING,
    SPLITS,
    Packed,
    PackingFormat,
    ShardEntry,
    ShardsSummary,
    SliceRecord,
    Split,
    ValidationRecord,
)

INDEX_FILE = "index.json"  # for mosaicml-streaming and what reads its format; ours is TABLE_FILE


def check_slices(records: Sequence[SliceRecord], fields: PackingFields) -> None:
    """Check that all slices together make a data set.

    Raises: DataError: no document at all, or none for a split that should have some.
    """
    other = next((record for record in records if record.format != records[0].format), None)
    if other is not None:
        raise DataError(
            f"slices {records[0].index} and {other.index} were written with different tokenizers or lengths: "
            f"{records[0].format} and {other.format}. Delete the tokenize stage's artifact and run it again."
        )
    num_documents: dict[Split, int] = {
        "train": sum(record.train.counts.num_documents for record in records if record.train),
        "valid": sum(record.held_out.num_documents for record in records if record.held_out),
    }
    _check_not_empty(num_documents, [record.positions for record in records if record.positions], fields)


def merge(
    out_dir: Path,
    slices: Sequence[SliceRecord],
    validation: Sequence[ValidationRecord],
    fields: PackingFields,
) -> ShardsSummary:
    """Write the indexes of both splits over all their folders in order. Only then are the shards a data set.

    Only the records are read, so the shards may be on other machines. A split without documents gets no index.
    Args: slices: as check_slices wants them. validation: the records of all that plan_validation(slices) gave.
    """
    format_ = slices[0].format
    folders: dict[Split, list[tuple[int, Packed]]] = {
        "train": sorted(((record.index, record.train) for record in slices if record.train), key=_number),
        "valid": sorted(((record.index, record.valid) for record in validation), key=_number),
    }
    counts = {split: sum((packed.counts for _, packed in folders[split]), NOTHING) for split in SPLITS}
    digests: dict[Split, str] = {}
    for split in SPLITS:
        if counts[split].num_samples:
            shards = [(number, shard) for number, packed in folders[split] for shard in packed.shards]
            _write_atomic(out_dir / split / INDEX_FILE, _index_json(format_, shards, fields.shard_bytes))
            data = pack_index(format_, counts[split], shards)
            _write_atomic(out_dir / split / TABLE_FILE, [data])
            digests[split] = hashlib.sha256(data).hexdigest()
    left_out = sum((Counter(record.left_out) for record in slices), Counter())
    return ShardsSummary(format=format_, counts=counts, left_out=dict(left_out), index_sha256=digests)


def _number(folder: tuple[int, Packed]) -> int:
    return folder[0]


def _index_json(format_: PackingFormat, shards: Sequence[tuple[int, ShardEntry]], shard_bytes: int) -> Iterator[bytes]:
    columns = columns_of(format_)
    yield b'{"shards": ['
    for place, (number, shard) in enumerate(shards):
        entry = shard._replace(name=f"{folder_name(number)}/{shard.name}")
        yield (", " * (place > 0) + dumps(index_entry(entry, columns, shard_bytes), sort_keys=True)).encode()
    yield b'], "version": 2}'


def _check_not_empty(num_of: dict[Split, int], positions: Sequence[tuple[float, float]], fields: PackingFields) -> None:
    num_documents = sum(num_of.values())
    if not num_documents:
        raise DataError("source: empty corpus: no document holds any text. Name files with text in them.")
    missing: Split = "valid" if num_of["train"] else "train"
    if num_of[missing] or (missing == "valid" and fields.validation_fraction == 0):
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


def _write_atomic(path: Path, pieces: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
