"""Reading finished shards: any sample by its number, every sample once in order, or whole documents.

Shapes: b batch (samples), t time (seq_len tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch

from base.errors import DamagedError
from base.verified import check_file
from data.errors import DataError
from data.index import REMEDY, TABLE_FILE, ShardIndex, parse_index
from data.mds import MdsShard
from data.packers import DOC_STARTS_DTYPE
from data.records import IS_ANSWER, IS_SOURCE, PackingFormat, ShardEntry, Split

IGNORED_TARGET = -100
PADDING_DOC = -1
_OPEN_SHARDS = 8  # of those who read in order


class TokenBatch(NamedTuple):
    """A micro batch, int64 throughout. The token at t is followed by the target at t.

    tokens_bt: inputs; padding holds the end-of-document token.
    targets_bt: the next tokens; IGNORED_TARGET where there is padding, or the loss counts only some tokens.
    doc_ids_bt: which document a token belongs to, non-decreasing along t; PADDING_DOC where there is padding.
    wanted_bt: bool, the tokens that answers are read off, if they are marked; None: the tokens are of no task.
    """

    tokens_bt: torch.Tensor
    targets_bt: torch.Tensor
    doc_ids_bt: torch.Tensor
    wanted_bt: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenBatch:
        """The function's results for all tensors there are."""
        wanted_bt = None if self.wanted_bt is None else function(self.wanted_bt)
        return TokenBatch(function(self.tokens_bt), function(self.targets_bt), function(self.doc_ids_bt), wanted_bt)


class ShardFiles(Protocol):
    """Where the files of a tokenised text are."""

    def read(self, name: str) -> bytes:
        """The whole of a small file. Raises FileNotFoundError."""

    def open(self, split: Split, entry: ShardEntry) -> BinaryIO:
        """A shard, its content compared with its digest. Raises DamagedError."""

    def fetch_ahead(self, split: Split, entries: Sequence[ShardEntry]) -> None:
        """Shards that will soon be opened; returns at once."""

    def __str__(self) -> str:
        """The place, for messages."""


class LocalShardFiles:
    """Shards on a disk of this machine, read where they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def open(self, split: Split, entry: ShardEntry) -> BinaryIO:
        path = self._folder / split / entry.name
        try:
            check_file(path, entry.num_bytes, entry.sha256)
        except DamagedError as error:
            raise DamagedError(f"{error}. {REMEDY}") from error
        return open(path, "rb")

    def fetch_ahead(self, split: Split, entries: Sequence[ShardEntry]) -> None:
        pass

    def __str__(self) -> str:
        return str(self._folder)


class TokenSplit:
    """One split of a tokenised text. Shards are opened, and their content is checked, when they are first read.

    Args: files: where its files are, or their folder on this machine.
    Raises: DataError: there is no index. DamagedError: it is not as it was written.
    """

    def __init__(self, files: ShardFiles | Path, split: Split) -> None:
        self.files: ShardFiles = LocalShardFiles(files) if isinstance(files, Path) else files
        self.split = split
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self.open_shard)

    @cached_property
    def index(self) -> ShardIndex:
        """What the split holds."""
        name = f"{self.split}/{TABLE_FILE}"
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            raise DataError(
                f"{self.files}/{name}: there is no index of the {self.split} split: tokenizing did not finish, or gave "
                "this split no document (validation_fraction=0 leaves `valid` empty). Run the tokenize stage, if need "
                "be with a larger validation_fraction."
            ) from None
        return parse_index(data, f"{self.files}/{name}")

    def open_shard(self, number: int) -> MdsShard:
        """A shard by its number in the index. Raises DamagedError: it is missing or not as it was written."""
        with self.files.open(self.split, self.index.entry(number)) as file:
            return MdsShard(file)

    def samples(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Samples in their order; only the shards that hold them are opened."""
        ends = self.index.sample_ends
        stop = self.index.counts.num_samples if stop is None else min(stop, self.index.counts.num_samples)
        while start < stop:
            number = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[number]) - int(self.index.shard_samples[number])
            shard = self._open(number)
            last = min(stop, int(ends[number]))
            yield from map(shard.sample, range(start - first, last - first))
            start = last


def collate(samples: Sequence[dict[str, np.ndarray]], format_: PackingFormat) -> TokenBatch:
    """Make one batch of samples."""
    shape = (len(samples), format_.seq_len)
    tokens_bt = np.full(shape, format_.eod_id, np.int64)
    targets_bt = np.full(shape, IGNORED_TARGET, np.int64)
    doc_ids_bt = np.full(shape, PADDING_DOC, np.int64)
    wanted_bt = np.zeros(shape, bool) if format_.has_loss_mask else None
    starts_t = np.empty(format_.seq_len + 1, np.int64)
    for row, sample in enumerate(samples):
        tokens = sample["tokens"]
        num_inputs = len(tokens) - 1
        tokens_bt[row, :num_inputs] = tokens[:-1]
        targets_bt[row, :num_inputs] = tokens[1:]
        if wanted_bt is not None:
            targets_bt[row, :num_inputs][sample["loss_mask"][1:] & IS_ANSWER == 0] = IGNORED_TARGET
            wanted_bt[row, :num_inputs] = sample["loss_mask"][:-1] & IS_SOURCE != 0
        starts_t[:] = 0
        starts_t[sample["doc_starts"].view(DOC_STARTS_DTYPE)] = 1
        np.cumsum(starts_t[:num_inputs], out=doc_ids_bt[row, :num_inputs])
    marks = None if wanted_bt is None else torch.from_numpy(wanted_bt)
    return TokenBatch(torch.from_numpy(tokens_bt), torch.from_numpy(targets_bt), torch.from_numpy(doc_ids_bt), marks)


def read_token_batches(
    tokens: TokenSplit,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
    start: int = 0,
) -> Iterator[TokenBatch]:
    """Every sample of a split once, in order, dealt out over `world_size` workers; ends.

    All workers get the same number of batches. The last may have fewer rows than batch_size; a worker for which no
    sample is left gets one row of padding, so that all take part in every collective.
    Args:
        max_samples: stop at this sample, counted over all workers.
        start: the first sample.
    Raises: DataError: there is no index. DamagedError: it or a shard is not as it was written.
    """
    index = tokens.index
    stop = min(index.counts.num_samples, max_samples or index.counts.num_samples)
    global_batch = batch_size * world_size
    for first in range(start, stop, global_batch):
        rows = list(tokens.samples(first, min(first + global_batch, stop)))[rank::world_size]
        yield collate(rows or [_padding_sample(index.format)], index.format)


class Stretch(NamedTuple):
    """Targets that follow one another in a split, int64, and the token before each. t: places (data.lineage)."""

    inputs_t: np.ndarray
    targets_t: np.ndarray


def read_stretch(tokens: TokenSplit, start: int, stop: int) -> Stretch:
    """The tokens at the places `start` to `stop`, exclusive, of a split, among which there is no padding.

    Raises: as read_token_batches.
    """
    seq_len = tokens.index.format.seq_len
    first = start // seq_len
    samples = [sample["tokens"] for sample in tokens.samples(first, -(-stop // seq_len))]
    inside = slice(start - first * seq_len, stop - first * seq_len)
    inputs_t, targets_t = (np.concatenate([ids[cut] for ids in samples]) for cut in (slice(None, -1), slice(1, None)))
    return Stretch(inputs_t[inside].astype(np.int64), targets_t[inside].astype(np.int64))


def read_token_documents(tokens: TokenSplit) -> Iterator[np.ndarray]:
    """The documents of a split, whole, in the order they were packed: each one's token ids without end-of-document.

    Raises: DataError: there is no index. DamagedError: it or a shard is not as it was written.
    """
    index = tokens.index
    firsts = index.sample_ends - index.shard_samples
    streams = np.flatnonzero(np.diff(index.folders, prepend=-1))  # the first shard of each
    bounds = [*firsts[streams].tolist(), index.counts.num_samples]
    for start, stop in pairwise(bounds):
        parts: list[np.ndarray] = []  # of the document begun
        for sample in tokens.samples(start, stop):
            inputs = sample["tokens"][:-1]  # the last one begins the next sample too, or ends the stream
            doc_starts = sample["doc_starts"].view(DOC_STARTS_DTYPE)
            continued, *begun = np.split(inputs, doc_starts[doc_starts < len(inputs)])
            parts.append(continued)
            for piece in begun:
                if any(map(len, parts)):
                    yield np.concatenate(parts)
                parts = [piece[1:]]
        yield np.concatenate(parts)


def _padding_sample(format_: PackingFormat) -> dict[str, np.ndarray]:
    return {
        "tokens": np.array([format_.eod_id]),
        "doc_starts": np.empty(0, np.uint8),
        "loss_mask": np.zeros(1, np.uint8),
    }
