"""Associative recall: every target can be read off the sequence, and only from the pair asked for."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks.mqar import RecallConfig
from data.tasks.recall_batches import RecallBatch, recall_batch, recall_batches


@st.composite
def configs(draw: st.DrawFn) -> RecallConfig:
    num_pairs = draw(st.integers(1, 12))
    num_queries = draw(st.integers(1, num_pairs))
    min_distance = draw(st.integers(1, 40))
    first_query = 2 * num_pairs - 1 + min_distance
    return RecallConfig(
        vocab_size=draw(st.integers(2 * num_pairs + 2, 80)),
        num_pairs=num_pairs,
        num_queries=num_queries,
        min_distance=min_distance,
        seq_len=first_query + num_queries + draw(st.integers(0, 30)),
        noise=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**32))
def test_targets_stand_behind_their_keys_at_the_start(config: RecallConfig, seed: int) -> None:
    batch = recall_batch(config, 5, seed)
    for tokens, targets, values_at, queries_at in zip(*batch, strict=True):
        assert np.flatnonzero(targets >= 0).tolist() == queries_at.tolist()
        assert len(set(queries_at.tolist())) == len(set(values_at.tolist())) == config.num_queries
        assert np.array_equal(tokens[queries_at], tokens[values_at - 1])
        assert np.array_equal(targets[queries_at], tokens[values_at])
        assert (values_at % 2 == 1).all()
        assert (values_at < 2 * config.num_pairs).all()
        assert (queries_at - values_at >= config.min_distance).all()
        is_key = (tokens < config.vocab_size // 2) & (config.noise | (tokens > 0))
        assert int(is_key.sum()) == config.num_pairs + config.num_queries, "a key occurs in its pair and its query only"
        keys = tokens[0 : 2 * config.num_pairs : 2]
        assert len(set(keys.tolist())) == config.num_pairs


def same(a: RecallBatch, b: RecallBatch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_follow_from_the_seed() -> None:
    config = RecallConfig()
    first, again, other = (list(islice(recall_batches(config, 4, seed), 3)) for seed in (7, 7, 8))
    assert all(map(same, first, again))
    assert not same(first[0], first[1])
    assert not any(same(a, b) for a in first for b in other)


def test_tasks_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"needs as many keys, but vocab_size=8 has 4\. Set vocab_size to at least 16"):
        RecallConfig(vocab_size=8, num_pairs=8)
    with pytest.raises(ValueError, match="num_queries=9 is more than num_pairs=8"):
        RecallConfig(num_queries=9)
    with pytest.raises(ValueError, match="no room for 8 queries behind position 55"):
        RecallConfig(seq_len=60, min_distance=40)
