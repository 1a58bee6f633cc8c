"""The order of samples as a formula: complete, the same for every way to ask, and local to blocks and paths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import SampleOrder

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def order_of(shard_samples: list[int], **settings: object) -> SampleOrder:
    return SampleOrder(np.array(shard_samples), **{"seed": 0, "block_samples": 16, **settings})  # type: ignore[arg-type]


def samples_at(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in order.at(positions)), strict=True))


def everything(shard_samples: list[int]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, count in enumerate(shard_samples) for sample in range(count)]


@settings(deadline=None, max_examples=30)
@given(shard_samples=sizes, seed=st.integers(0, 5), block_samples=st.integers(1, 100))
def test_an_epoch_holds_each_sample_once_and_the_next_in_another_order(
    shard_samples: list[int], seed: int, block_samples: int
) -> None:
    order = order_of(shard_samples, seed=seed, block_samples=block_samples)
    total = sum(shard_samples)
    epochs = [samples_at(order, np.arange(epoch * total, (epoch + 1) * total)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything(shard_samples)
    if total > 30 and block_samples > 10:
        assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None, max_examples=30)
@given(shard_samples=sizes, num_paths=st.integers(1, 5), seed=st.integers(0, 5))
def test_each_path_reads_each_sample_of_its_stretch_once_per_epoch(
    shard_samples: list[int], num_paths: int, seed: int
) -> None:
    total = sum(shard_samples)
    if total < num_paths:
        return
    order = order_of(shard_samples, num_paths=num_paths, seed=seed, shuffle=False)
    rows = everything(shard_samples)
    for path in range(num_paths):
        stretch = rows[path * total // num_paths : (path + 1) * total // num_paths]
        positions = path + num_paths * np.arange(2 * len(stretch))
        assert samples_at(order, positions) == stretch * 2


@settings(deadline=None, max_examples=30)
@given(shard_samples=sizes, num_paths=st.integers(1, 3), start=st.integers(0, 500), data=st.data())
def test_a_position_has_the_same_sample_however_it_is_asked_for(
    shard_samples: list[int], num_paths: int, start: int, data: st.DataObject
) -> None:
    if sum(shard_samples) < num_paths:
        return
    positions = start + np.arange(40)
    together = samples_at(order_of(shard_samples, num_paths=num_paths), positions)
    shuffled = data.draw(st.permutations(range(40)))
    order = order_of(shard_samples, num_paths=num_paths)
    assert [samples_at(order, positions[i : i + 1])[0] for i in shuffled] == [together[i] for i in shuffled]


def test_without_shuffling_samples_come_in_their_order() -> None:
    shard_samples = [3, 1, 4, 1, 5]
    assert samples_at(order_of(shard_samples, shuffle=False), np.arange(28)) == everything(shard_samples) * 2


@settings(deadline=None, max_examples=30)
@given(shard_samples=sizes, num_paths=st.integers(1, 3), block_samples=st.integers(1, 60))
def test_blocks_name_the_shards_that_are_read_and_follow_each_other(
    shard_samples: list[int], num_paths: int, block_samples: int
) -> None:
    total = sum(shard_samples)
    if total < num_paths:
        return
    order = order_of(shard_samples, num_paths=num_paths, block_samples=block_samples)
    for path in range(num_paths):
        block = None
        for position in range(path, 3 * total, num_paths):
            at = np.array([position])
            (found,) = order.blocks(at)
            if block is not None and found != block:
                assert found == order.next_block(block)
            block = found
            assert order.at(at).shards[0] in order.shards_of(found)


def test_a_block_needs_few_of_many_shards() -> None:
    order = order_of([10] * 1000, block_samples=50)
    (block,) = order.blocks(np.array([0]))
    assert len(order.shards_of(block)) == 5
    assert len(set(order.at(np.arange(50)).shards.tolist())) == 5


@pytest.mark.parametrize("position", [0, 9 * 10**8, 7 * 10**9])
def test_a_thousand_million_samples_take_no_time(position: int) -> None:
    """That this ends at all is the test: an order that is a list would take minutes and gigabytes."""
    order = SampleOrder(np.full(125_000, 8000), seed=0)
    shards, samples = order.at(position + np.arange(1024))
    assert len(set(zip(shards.tolist(), samples.tolist(), strict=True))) == 1024
