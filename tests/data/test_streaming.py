"""The training stream: the same global batches for every number of workers, exact resume, data identity."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DamagedError
from data.batches import Batches, BatchPhase
from data.errors import DataError
from data.mixture import Mixture, Phase
from data.shards import TokenBatch, TokenSplit, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker

GLOBAL_BATCH = 24
Rows = list[tuple[int, ...]]


def open_train(
    shards: Path,
    micro_batch_size: int = 4,
    global_batch_size: int = GLOBAL_BATCH,
    worker: Worker = Worker(),  # noqa: B008  # immutable
    **order: Any,
) -> TokenStream:
    return TokenStream(
        [TokenSplit(shards, "train")],
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        order=StreamOrder(**{"block_samples": 64, **order}),
        worker=worker,
    )


def rows(batch: TokenBatch) -> Rows:
    return [tuple(row.tolist()) for row in batch.tokens_bt]


def steps_of(stream: TokenStream, num_steps: int) -> list[Rows]:
    """This worker's rows of each global batch."""
    share = GLOBAL_BATCH // stream.worker.world_size // stream.micro_batch_size
    batches = iter(stream)
    return [[row for batch in islice(batches, share) for row in rows(batch)] for _ in range(num_steps)]


def test_an_epoch_holds_each_sample_once(shards_16: Path) -> None:
    everything = [row for batch in read_token_batches(TokenSplit(shards_16, "train"), 64) for row in rows(batch)]
    with open_train(shards_16, micro_batch_size=1, global_batch_size=1) as stream:
        batches = iter(stream)
        epochs = [[row for batch in islice(batches, len(everything)) for row in rows(batch)] for _ in range(2)]
    assert stream.num_samples == len(everything)
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything)
    assert epochs[0] != epochs[1]


def test_without_shuffling_the_samples_come_in_their_order(shards_16: Path) -> None:
    (everything,) = read_token_batches(TokenSplit(shards_16, "train"), 10_000)
    with open_train(shards_16, shuffle=False) as stream:
        first = [row for batch in islice(iter(stream), 6) for row in rows(batch)]
    assert rows(everything)[: len(first)] == first


@settings(max_examples=10, deadline=None)
@given(step=st.integers(0, 40), seed=st.integers(0, 3))
def test_resuming_at_any_step_gives_exactly_the_remaining_batches(shards_16: Path, step: int, seed: int) -> None:
    micro_batches = GLOBAL_BATCH // 4
    with open_train(shards_16, seed=seed) as stream:
        batches = iter(stream)
        for _ in range(step * micro_batches):
            next(batches)
        state = json.loads(json.dumps(stream.state_dict(step * GLOBAL_BATCH)))
        expected = [next(batches) for _ in range(3 * micro_batches)]
    with open_train(shards_16, seed=seed) as stream:
        stream.load_state_dict(state)
        for want, got in zip(expected, stream, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(want[:3], got[:3], strict=True))


@pytest.mark.parametrize("num_paths", [1, 2, 3])
def test_every_number_of_workers_shares_the_same_global_batches(shards_16: Path, num_paths: int) -> None:
    num_steps = 30  # more than an epoch
    with open_train(shards_16, num_paths=num_paths) as stream:
        expected = [sorted(step) for step in steps_of(stream, num_steps)]
        assert stream.num_samples < num_steps * GLOBAL_BATCH
    for world_size, micro_batch_size in ((2, 3), (3, 8), (4, 2), (8, 1), (12, 2)):
        shares = []
        for rank in range(world_size):
            with open_train(shards_16, micro_batch_size, worker=Worker(rank, world_size), num_paths=num_paths) as part:
                shares.append(steps_of(part, num_steps))
        assert [sorted(row for share in shares for row in share[step]) for step in range(num_steps)] == expected


def test_workers_of_one_path_need_only_its_shards(shards_16: Path) -> None:
    needed = []
    for rank in range(2):
        with open_train(shards_16, worker=Worker(rank, 2), num_paths=2) as stream:
            places = [place for step in range(6) for place in stream.places(step)]
        needed.append({place.shard for place in places})
    assert len(needed[0] & needed[1]) <= 1, "only the shard at the border of the two"


def mixed(folders: list[Path], weights: list[int], **settings: Any) -> TokenStream:
    shares = tuple(Fraction(weight, sum(weights)) for weight in weights)
    return TokenStream(
        [TokenSplit(folder, "train") for folder in folders],
        micro_batch_size=4,
        global_batch_size=GLOBAL_BATCH,
        order=StreamOrder(block_samples=64),
        worker=Worker(),
        mixture=Mixture([Phase(0, shares)]),
        **settings,
    )


def test_a_mixture_takes_its_shares_and_resumes(shards_16: Path, other_shards_16: Path) -> None:
    folders = [shards_16, other_shards_16]
    first, second = (
        {row for batch in read_token_batches(TokenSplit(folder, "train"), 64) for row in rows(batch)}
        for folder in folders
    )
    with mixed(folders, [3, 1]) as stream:
        steps = steps_of(stream, 12)
        state = stream.state_dict(5 * GLOBAL_BATCH)
    assert not first & second
    for step in steps:
        assert (len([row for row in step if row in first]), len([row for row in step if row in second])) == (18, 6)
    with mixed(folders, [3, 1]) as stream:
        stream.load_state_dict(state)
        assert steps_of(stream, 7) == steps[5:]
    with mixed(folders, [2, 1]) as stream, pytest.raises(DataError, match="another stream of data: mixture"):
        stream.load_state_dict(state)


def test_a_checkpoint_of_other_data_or_settings_is_refused(shards_16: Path) -> None:
    with open_train(shards_16) as stream:
        state = stream.state_dict(48)
        for name, value in {"index_sha256": ["0" * 64], "seed": 9, "global_batch_size": 12}.items():
            with pytest.raises(DataError, match=rf"another stream of data: {name} .* then, .* now"):
                stream.load_state_dict({**state, name: value})


def test_state_is_loaded_before_the_iteration_and_a_closed_stream_says_so(shards_16: Path) -> None:
    stream = open_train(shards_16)
    next(iter(stream))
    with pytest.raises(RuntimeError, match="before the iteration"):
        stream.load_state_dict(stream.state_dict(0))
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        iter(stream)


def test_a_closed_stream_leaves_no_thread(shards_16: Path) -> None:
    before = threading.active_count()
    with open_train(shards_16) as stream:
        next(iter(stream))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_too_little_data_and_workers_that_do_not_divide_are_errors(shards_16: Path) -> None:
    with pytest.raises(DataError, match="fewer than one global batch of 4096"):
        open_train(shards_16, global_batch_size=4096)
    with pytest.raises(ValueError, match="global_batch_size=24 is not a multiple of micro_batch_size=5 x 1 workers"):
        open_train(shards_16, micro_batch_size=5)
    with pytest.raises(ValueError, match="global_batch_size=24 is not a multiple of num_paths=7"):
        open_train(shards_16, num_paths=7)


@pytest.fixture
def copied(shards_16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards_16, tmp_path / "copy"))


def damages(folder: Path) -> Iterator[Path]:
    """One shard damaged at a time, each in another way."""
    first, second, *_ = sorted((folder / "train").rglob("*.mds"))
    whole = first.read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    for data in (bytes(flipped), whole[:-1], second.read_bytes()):
        first.write_bytes(data)
        yield first
        first.write_bytes(whole)
    first.unlink()
    yield first


def test_a_damaged_shard_is_refused_by_name_when_it_is_first_read(copied: Path) -> None:
    for shard in damages(copied):
        with open_train(copied) as stream, pytest.raises(DamagedError, match=f"{shard.parent.name}/{shard.name}"):
            steps_of(stream, 20)


GROWING = Batches(GLOBAL_BATCH, [BatchPhase(4, 3), BatchPhase(12, 2)], first_position=100)


def growing(shards: Path, rank: int, world_size: int, batches: Batches = GROWING) -> TokenStream:
    return TokenStream(
        [TokenSplit(shards, "train")], micro_batch_size=2, global_batch_size=GLOBAL_BATCH, batches=batches,
        order=StreamOrder(block_samples=64), worker=Worker(rank, world_size),
    )  # fmt: skip


def rows_of_steps(shards: Path, world_size: int, first_step: int, num_steps: int) -> list[Rows]:
    """The rows of each global batch, of all workers, sorted."""
    found: list[Rows] = [[] for _ in range(num_steps)]
    for rank in range(world_size):
        with growing(shards, rank, world_size) as stream:
            position = GROWING.start(first_step)
            stream.load_state_dict(json.loads(json.dumps(stream.state_dict(position))))
            batches = iter(stream)
            for number in range(num_steps):
                share = GROWING.size(first_step + number) // world_size // 2
                found[number] += [row for batch in islice(batches, share) for row in rows(batch)]
    return [sorted(step) for step in found]


def test_growing_batches_are_the_same_samples_for_every_number_of_workers_and_after_a_resume(shards_16: Path) -> None:
    with open_train(shards_16, micro_batch_size=1, global_batch_size=1) as stream:
        line = [row for batch in islice(iter(stream), 184) for row in rows(batch)]
    whole = rows_of_steps(shards_16, 1, 0, 7)
    assert [len(step) for step in whole] == [4, 4, 4, 12, 12, 24, 24]
    assert whole == [sorted(line[GROWING.start(s) : GROWING.start(s + 1)]) for s in range(7)]
    assert rows_of_steps(shards_16, 2, 0, 7) == whole
    for step in (2, 3, 4, 6):
        assert rows_of_steps(shards_16, 2, step, 7 - step) == whole[step:]


def test_a_state_of_other_batches_is_refused_but_its_order_may_be_gone_on_in(shards_16: Path) -> None:
    with open_train(shards_16) as plain, growing(shards_16, 0, 1) as grown:
        for one, other in ((plain, grown), (grown, plain)):
            with pytest.raises(DataError, match="batch_phases"):
                one.load_state_dict(other.state_dict(96))
            one.require_same_order(other.state_dict(96))
    with (
        open_train(shards_16, seed=1) as other,
        growing(shards_16, 0, 1) as grown,
        pytest.raises(DataError, match="seed"),
    ):
        grown.require_same_order(other.state_dict(96))
