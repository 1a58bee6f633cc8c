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
    Packed,
    PackingFormat,
    Reason,
    ShardEntry,
    ShardsSummary,
    SliceRecord,
    SliceRecords,
    Split,
    ValidationRecord,
)

INDEX_FILE = "index.json"  # for mosaicml-streaming and what reads its format; ours is TABLE_FILE


def check_slices(records: SliceRecords, fields: PackingFields) -> None:
    """Check that all slices together make a data set.

    Raises: DataError: no document at all, or none for a split that should have some.
    """
    first: SliceRecord | None = None
    num_of: dict[Split, int] = {"train": 0, "valid": 0}
    least, greatest = 1.0, 0.0
    for record in records:
        first = first or record
        if record.format != first.format:
            raise DataError(
                f"slices {first.index} and {record.index} were written with different tokenizers or lengths: "
                f"{first.format} and {record.format}. Delete the tokenize stage's artifact and run it again."
            )
        num_of["train"] += record.train.counts.num_documents if record.train else 0
        num_of["valid"] += record.held_out.num_documents if record.held_out else 0
        if record.positions:
            least, greatest = min(least, record.positions[0]), max(greatest, record.positions[1])
    _check_not_empty(num_of, least, greatest, fields)


def merge(
    out_dir: Path, slices: SliceRecords, validation: Iterable[ValidationRecord], fields: PackingFields
) -> ShardsSummary:
    """Write the indexes of both splits over all their folders in order. Only then are the shards a data set.

    Only the records are read, so the shards may be on other machines. A split without documents gets no index.
    Args: slices: as check_slices wants them. validation: the records of all that plan_validation(slices) gave.
    """
    train, valid = _Split(), _Split()
    left_out: Counter[Reason] = Counter()
    for record in slices:
        format_ = record.format
        left_out.update(record.left_out)
        if record.train:
            train.add(record.index, record.train)
    for stream in sorted(validation, key=lambda stream: stream.index):
        valid.add(stream.index, stream.valid)
    splits: dict[Split, _Split] = {"train": train, "valid": valid}
    digests: dict[Split, str] = {}
    for name, split in splits.items():
        if split.shards:
            _write_atomic(out_dir / name / INDEX_FILE, _index_json(format_, split.shards, fields.shard_bytes))
            data = pack_index(format_, split.counts, split.shards)
            _write_atomic(out_dir / name / TABLE_FILE, [data])
            digests[name] = hashlib.sha256(data).hexdigest()
    counts = {name: split.counts for name, split in splits.items()}
    return ShardsSummary(format=format_, counts=counts, left_out=dict(left_out), index_sha256=digests)


class _Split:
    """What all folders of a split hold together, and their shards, each with the number of its folder."""

    def __init__(self) -> None:
        self.counts = NOTHING
        self.shards: list[tuple[int, ShardEntry]] = []

    def add(self, number: int, packed: Packed) -> None:
        self.counts += packed.counts
        self.shards += [(number, shard) for shard in packed.shards]


def _index_json(format_: PackingFormat, shards: Sequence[tuple[int, ShardEntry]], shard_bytes: int) -> Iterator[bytes]:
    columns = columns_of(format_)
    yield b'{"shards": ['
    for place, (number, shard) in enumerate(shards):
        entry = shard._replace(name=f"{folder_name(number)}/{shard.name}")
        yield (", " * (place > 0) + dumps(index_entry(entry, columns, shard_bytes), sort_keys=True)).encode()
    yield b'], "version": 2}'


def _check_not_empty(num_of: dict[Split, int], least: float, greatest: float, fields: PackingFields) -> None:
    num_documents = sum(num_of.values())
    if not num_documents:
        raise DataError("source: empty corpus: no document holds any text. Name files with text in them.")
    missing: Split = "valid" if num_of["train"] else "train"
    if num_of[missing] or (missing == "valid" and fields.validation_fraction == 0):
        return
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
