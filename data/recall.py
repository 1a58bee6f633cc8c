"""Multi-query associative recall (MQAR, arXiv:2312.04927): a synthetic task that only a memory can solve.

    k1 v1 k2 v2 ... kP vP  . . . k2 . . k1 . . .        keys and values first, queries later among noise
                                 ^ v2   ^ v1            the target at a query is the value that stood behind its key

Keys are drawn from the ids below vocab_size / 2 without repetition, values from those above; noise is drawn from the
values, so that no key occurs but in its pair and its query. Shapes: b batch, t time, k pairs, q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from base.config import StrictConfig
from data.shards import IGNORED_TARGET


class RecallConfig(StrictConfig):
    """One task. Lengths, positions and distances are in tokens."""

    vocab_size: int = Field(64, ge=4, description="Number of ids; the lower half are keys, the upper half values.")
    num_pairs: int = Field(8, ge=1, description="Pairs of key and value at the start.")
    seq_len: int = Field(64, ge=3, description="Length of a sequence.")
    num_queries: int = Field(8, ge=1, description="Queries, each for another pair.")
    min_distance: int = Field(1, ge=1, description="Least distance from a value to the query for its key.")
    noise: bool = Field(
        True, description="Fill the rest with random values; otherwise with id 0, which then is no key."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        num_keys = self.vocab_size // 2 - (not self.noise)
        if self.num_pairs > num_keys:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs as many keys, but vocab_size={self.vocab_size} has {num_keys}. "
                f"Set vocab_size to at least {2 * (self.num_pairs + (not self.noise))}."
            )
        if self.num_queries > self.num_pairs:
            raise ValueError(f"num_queries={self.num_queries} is more than num_pairs={self.num_pairs}; lower it.")
        if self.seq_len < self.first_query + self.num_queries:
            raise ValueError(
                f"seq_len={self.seq_len} has no room for {self.num_queries} queries behind position {self.first_query} "
                f"(2 num_pairs, or min_distance behind the last value). Need {self.first_query + self.num_queries}."
            )
        return self

    @property
    def first_query(self) -> int:
        """Earliest position of a query: behind the pairs, and far enough from every value."""
        return 2 * self.num_pairs - 1 + self.min_distance


class RecallBatch(NamedTuple):
    """Sequences, int64. Unlike text, the target at t belongs to the token at t: predict the value of the key there."""

    tokens_bt: torch.Tensor
    targets_bt: torch.Tensor  # the value at queries, IGNORED_TARGET elsewhere
    value_positions_bq: torch.Tensor  # where the value that answers each query stands; its key stands one before
    query_positions_bq: torch.Tensor  # in increasing order


def recall_batch(config: RecallConfig, batch_size: int, seed: int) -> RecallBatch:
    """Draw a batch; the same arguments give the same batch."""
    rng = np.random.default_rng(seed)
    first_key, first_value = int(not config.noise), config.vocab_size // 2
    shape = (batch_size, config.seq_len)
    tokens_bt = rng.integers(first_value, config.vocab_size, shape) if config.noise else np.zeros(shape, np.int64)

    keys_bk = _distinct(rng, batch_size, first_value - first_key, config.num_pairs) + first_key
    values_bk = rng.integers(first_value, config.vocab_size, (batch_size, config.num_pairs))
    tokens_bt[:, 0 : 2 * config.num_pairs : 2] = keys_bk
    tokens_bt[:, 1 : 2 * config.num_pairs : 2] = values_bk

    places = config.seq_len - config.first_query
    query_positions_bq = np.sort(_distinct(rng, batch_size, places, config.num_queries), axis=1) + config.first_query
    asked_bq = _distinct(rng, batch_size, config.num_pairs, config.num_queries)
    np.put_along_axis(tokens_bt, query_positions_bq, np.take_along_axis(keys_bk, asked_bq, axis=1), axis=1)
    targets_bt = np.full(shape, IGNORED_TARGET, np.int64)
    np.put_along_axis(targets_bt, query_positions_bq, np.take_along_axis(values_bk, asked_bq, axis=1), axis=1)
    return RecallBatch(*map(torch.from_numpy, (tokens_bt, targets_bt, 2 * asked_bq + 1, query_positions_bq)))


def recall_batches(config: RecallConfig, batch_size: int, seed: int) -> Iterator[RecallBatch]:
    """Endless batches, each drawn by itself; the same arguments give the same batches."""
    first = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])  # so that near seeds share no batch
    for step in count():
        yield recall_batch(config, batch_size, first + step)


def _distinct(rng: np.random.Generator, rows: int, choices: int, how_many: int) -> np.ndarray:
    """`how_many` different integers below `choices` in each row, in random order."""
    return np.argsort(rng.random((rows, choices)), axis=1)[:, :how_many]
