"""Which sample stands at which position of training: a formula of seed and position, whatever the number of workers.

An epoch lays the shards in a random row and takes the samples of the row block by block, shuffled inside each block; so
only the shards of a block are needed at a time. Neither the order nor a place in it takes memory per sample.

With several paths the row is cut into as many equal stretches. Position p belongs to path p mod N, so that each global
batch takes as many samples of every path. Workers that keep to one path need only its shards.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.permutation import Permutation

BLOCK_SAMPLES = 1 << 16
_SHARDS, _SAMPLES = 0, 1  # what a key is for


class Places(NamedTuple):
    """Samples by the number of their shard, and their number in it; int64, one each per position."""

    shards: np.ndarray
    samples: np.ndarray


class Block(NamedTuple):
    """Samples that are shuffled among each other: the `number`-th of a path in an epoch."""

    path: int
    epoch: int
    number: int


class _Row(NamedTuple):
    """The shards of an epoch in their order, and where each ends in the row of all samples."""

    shards: np.ndarray
    ends: np.ndarray


class SampleOrder:
    """The endless order of the samples of one set of shards.

    Every path reads each sample of its stretch exactly once per epoch, in another order each time. Epochs follow each
    other without a gap; a global batch may hold the end of one and the beginning of the next.

    Args:
        shard_samples: number of samples of each shard.
        shuffle: False reads them in their order, in every epoch.
        block_samples: samples that are shuffled among each other.
    """

    def __init__(
        self,
        shard_samples: np.ndarray,
        seed: int,
        shuffle: bool = True,
        num_paths: int = 1,
        block_samples: int = BLOCK_SAMPLES,
    ) -> None:
        self._shard_samples = np.asarray(shard_samples, np.int64)
        self.num_samples = int(self._shard_samples.sum())
        self.num_paths = num_paths
        self._seed, self._shuffle, self._block_samples = seed, shuffle, block_samples
        # Four: paths may stand on both sides of the end of an epoch, and so may those who look ahead.
        self._row = lru_cache(maxsize=4)(self._make_row)

    def at(self, positions: np.ndarray) -> Places:
        """Where the samples at `positions` (int64, from 0, counted over all epochs) are."""
        positions = np.asarray(positions, np.int64)
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        blocks, block_of = self._blocks_at(positions)
        for number, block in enumerate(blocks):
            mine = block_of == number
            first, size = self._extent(block)
            start, end = self._stretch(block.path)
            inside = positions[mine] // self.num_paths % (end - start) - (first - start)
            if self._shuffle:
                inside = Permutation(size, (self._seed, _SAMPLES, *block))(inside)
            row = self._row(block.epoch)
            ranks = np.searchsorted(row.ends, first + inside, side="right")
            shards[mine] = row.shards[ranks]
            samples[mine] = first + inside - (row.ends[ranks] - self._shard_samples[row.shards[ranks]])
        return Places(shards, samples)

    def blocks(self, positions: np.ndarray) -> list[Block]:
        """The blocks that the samples at `positions` belong to."""
        return self._blocks_at(np.asarray(positions, np.int64))[0]

    def next_block(self, block: Block) -> Block:
        """The block behind it on its path."""
        start, end = self._stretch(block.path)
        if (block.number + 1) * self._block_samples < end - start:
            return block._replace(number=block.number + 1)
        return Block(block.path, block.epoch + 1, 0)

    def shards_of(self, block: Block) -> list[int]:
        """The shards that hold a block's samples."""
        first, size = self._extent(block)
        row = self._row(block.epoch)
        low, high = np.searchsorted(row.ends, (first, first + size - 1), side="right").tolist()
        shards: list[int] = row.shards[low : high + 1].tolist()
        return shards

    def _blocks_at(self, positions: np.ndarray) -> tuple[list[Block], np.ndarray]:
        """The blocks of positions, and the number in that list of each position's."""
        paths = positions % self.num_paths
        bounds = np.array([self._stretch(path) for path in range(self.num_paths)])
        lengths = (bounds[:, 1] - bounds[:, 0])[paths]
        epochs, inside = np.divmod(positions // self.num_paths, lengths)
        keys = np.stack((paths, epochs, inside // self._block_samples), axis=-1)
        blocks, block_of = np.unique(keys, axis=0, return_inverse=True)
        return [Block(*key) for key in blocks.tolist()], block_of.reshape(-1)

    def _extent(self, block: Block) -> tuple[int, int]:
        """First sample in the row, and number of samples."""
        start, end = self._stretch(block.path)
        first = start + block.number * self._block_samples
        return first, min(self._block_samples, end - first)

    def _stretch(self, path: int) -> tuple[int, int]:
        return path * self.num_samples // self.num_paths, (path + 1) * self.num_samples // self.num_paths

    def _make_row(self, epoch: int) -> _Row:
        shards = np.arange(len(self._shard_samples))
        if self._shuffle:
            shards = Permutation(len(shards), (self._seed, _SHARDS, epoch))(shards)
        return _Row(shards, self._shard_samples[shards].cumsum())
