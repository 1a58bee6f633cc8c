"""Sequences of multi-query associative recall, many at once (data/tasks/mqar.py says what they look like).

Shapes: b batch, t time, k pairs, q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from data.tasks.mqar import RecallConfig

NO_TARGET = -100


class RecallBatch(NamedTuple):
    """Sequences, int64. Unlike text, the target at t belongs to the token at t: predict the value of the key there."""

    tokens_bt: np.ndarray
    targets_bt: np.ndarray  # the value at queries, NO_TARGET elsewhere
    value_positions_bq: np.ndarray  # where the value that answers each query stands; its key stands one before
    query_positions_bq: np.ndarray  # in increasing order


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
    targets_bt = np.full(shape, NO_TARGET, np.int64)
    np.put_along_axis(targets_bt, query_positions_bq, np.take_along_axis(values_bk, asked_bq, axis=1), axis=1)
    return RecallBatch(tokens_bt, targets_bt, 2 * asked_bq + 1, query_positions_bq)


def recall_batches(config: RecallConfig, batch_size: int, seed: int) -> Iterator[RecallBatch]:
    """Endless batches, each drawn by itself; the same arguments give the same batches."""
    first = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])  # so that near seeds share no batch
    for step in count():
        yield recall_batch(config, batch_size, first + step)


def _distinct(rng: np.random.Generator, rows: int, choices: int, how_many: int) -> np.ndarray:
    """`how_many` different integers below `choices` in each row, in random order."""
    return np.argsort(rng.random((rows, choices)), axis=1)[:, :how_many]
