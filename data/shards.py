"""Reading finished shards in order: whole documents, or every sample once (validation, evaluation).

Shapes: b batch (samples), t time (seq_len tokens).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from base.errors import DamagedError
from base.sealed import unseal
from base.verified import check_file
from data.errors import DataError
from data.packing import DOC_STARTS_DTYPE, INDEX_FILE
from data.records import PackingFormat, Split, SplitCounts

IGNORED_TARGET = -100
PADDING_DOC = -1
_REMEDY = "Delete the tokenize stage's artifact and run it again."


class TokenBatch(NamedTuple):
    """A micro batch, int64 throughout. The token at t is followed by the target at t.

    tokens_bt: inputs; padding holds the end-of-document token.
    targets_bt: the next tokens; IGNORED_TARGET where there is padding.
    doc_ids_bt: which document a token belongs to, non-decreasing along t; PADDING_DOC where there is padding.
    """

    tokens_bt: torch.Tensor
    targets_bt: torch.Tensor
    doc_ids_bt: torch.Tensor


@dataclass(frozen=True)
class ShardIndex:
    """What a split's index.json says."""

    folder: Path
    format: PackingFormat
    counts: SplitCounts
    shards: tuple[dict[str, Any], ...]
    sha256: str


def read_index(shards_dir: Path, split: Split) -> ShardIndex:
    """Read a split's index and check that its shards have their sizes; their content is checked when they are read.

    Raises: DataError: the index is missing. DamagedError: it, or the size of a shard, is not as it was written.
    """
    folder = Path(shards_dir) / split
    file = folder / INDEX_FILE
    try:
        data = file.read_bytes()
        index = unseal(data, str(file))
        result = ShardIndex(
            folder=folder,
            format=PackingFormat.model_validate(index["format"]),
            counts=SplitCounts.model_validate(index["counts"]),
            shards=tuple(index["shards"]),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except FileNotFoundError:
        raise DataError(
            f"{file}: there is no index of the {split} split: tokenizing did not finish, or gave this split no "
            "document (validation_fraction=0 leaves `valid` empty). Run the tokenize stage, if need be with a larger "
            "validation_fraction."
        ) from None
    except (DamagedError, ValidationError, KeyError) as error:
        what = str(error) if isinstance(error, DamagedError) else f"{file}: of another version"
        raise DamagedError(f"{what}. {_REMEDY}") from error
    for shard in result.shards:
        _check_shard(folder, shard, size_only=True)
    return result


def check_shards(index: ShardIndex) -> None:
    """Raises: DamagedError: a shard is missing or not as it was written."""
    for shard in index.shards:
        _check_shard(index.folder, shard)


def _check_shard(folder: Path, shard: dict[str, Any], size_only: bool = False) -> None:
    raw = shard["raw_data"]
    try:
        check_file(folder / raw["basename"], raw["bytes"], None if size_only else raw["hashes"]["sha256"])
    except DamagedError as error:
        raise DamagedError(f"{error}. {_REMEDY}") from error


def collate(samples: Sequence[dict[str, Any]], format_: PackingFormat) -> TokenBatch:
    """Make one batch of MDS samples."""
    shape = (len(samples), format_.seq_len)
    tokens_bt = np.full(shape, format_.eod_id, np.int64)
    targets_bt = np.full(shape, IGNORED_TARGET, np.int64)
    doc_ids_bt = np.full(shape, PADDING_DOC, np.int64)
    for row, sample in enumerate(samples):
        tokens = sample["tokens"]
        num_inputs = len(tokens) - 1
        doc_starts = np.frombuffer(sample["doc_starts"], DOC_STARTS_DTYPE)
        tokens_bt[row, :num_inputs] = tokens[:-1]
        targets_bt[row, :num_inputs] = tokens[1:]
        doc_ids_bt[row, :num_inputs] = np.searchsorted(doc_starts, np.arange(num_inputs), side="right")
    return TokenBatch(torch.from_numpy(tokens_bt), torch.from_numpy(targets_bt), torch.from_numpy(doc_ids_bt))


def read_token_batches(
    shards_dir: Path, split: Split, batch_size: int, rank: int = 0, world_size: int = 1, max_samples: int | None = None
) -> Iterator[TokenBatch]:
    """Every sample of a split once, in order, dealt out over `world_size` workers; ends.

    All workers get the same number of batches. The last may have fewer rows than batch_size; a worker for which no
    sample is left gets one row of padding, so that all take part in every collective.
    Args:
        max_samples: stop after this many samples over all workers.
    Raises: DataError: as read_index, or a shard is missing or damaged.
    """
    index = read_index(shards_dir, split)
    num_samples = min(index.counts.num_samples, max_samples or index.counts.num_samples)
    samples = _read_samples(index.folder, index.shards)
    global_batch = batch_size * world_size
    for start in range(0, num_samples, global_batch):
        rows = [next(samples) for _ in range(start, min(start + global_batch, num_samples))][rank::world_size]
        yield collate(rows or [_padding_sample(index.format)], index.format)


def read_token_documents(shards_dir: Path, split: Split) -> Iterator[np.ndarray]:
    """The documents of a split, whole, in the order they were packed: each one's token ids without end-of-document.

    Raises: DataError: as read_index, or a shard is missing or damaged.
    """
    index = read_index(shards_dir, split)
    for _, shards in groupby(index.shards, key=lambda shard: Path(shard["raw_data"]["basename"]).parent):
        parts: list[np.ndarray] = []  # of the document begun
        for sample in _read_samples(index.folder, shards):
            inputs = sample["tokens"][:-1]  # the last one begins the next sample too, or ends the slice
            doc_starts = np.frombuffer(sample["doc_starts"], DOC_STARTS_DTYPE)
            continued, *begun = np.split(inputs, doc_starts[doc_starts < len(inputs)])
            parts.append(continued)
            for piece in begun:
                if any(map(len, parts)):
                    yield np.concatenate(parts)
                parts = [piece[1:]]
        yield np.concatenate(parts)


def _read_samples(folder: Path, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from streaming.base.format import reader_from_json

    for shard in shards:
        _check_shard(folder, shard)
        reader = reader_from_json(str(folder), "", shard)
        for index in range(shard["samples"]):
            yield reader[index]


def _padding_sample(format_: PackingFormat) -> dict[str, Any]:
    return {"tokens": np.array([format_.eod_id]), "doc_starts": b""}
