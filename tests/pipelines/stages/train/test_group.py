"""How many workers train together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.engine.placement import ClusterNode
from pipelines.engine.stage import Resources
from pipelines.errors import InfrastructureError
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train import group
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.group import GRACE_S, choose_size, growing
from tests.pipelines.stages.train.training import Tokens
from tests.pipelines.waiting import wait_until

MakeConfig = Callable[..., TrainStageConfig]


def ids_of_step(config: TrainStageConfig, tokens: Tokens, step: int) -> list[tuple[int, ...]]:
    """The samples of a global batch, over all workers, as the workers' streams give them."""
    found: list[tuple[int, ...]] = []
    for rank in range(config.resources.num_workers):
        with TokenStream(
            [token_split(tokens.artifact, "train")],
            micro_batch_size=config.worker_micro_batch_size,
            global_batch_size=config.global_batch_size,
            order=StreamOrder(config.seed, num_paths=config.data.paths),
            worker=Worker(rank, config.resources.num_workers),
        ) as stream:
            places = stream.places(step)
            assert len(places) == config.accumulation_steps * config.worker_micro_batch_size
            found += [tuple(place) for place in places]
    return sorted(found)


@pytest.mark.parametrize("paths", [1, 4])
def test_every_size_of_the_group_reads_the_same_samples_in_every_step(
    train_config: MakeConfig, tokens: Tokens, paths: int
) -> None:
    config = train_config(
        global_batch_size=24, micro_batch_size=5, data={"paths": paths}, resources={"num_workers": 12, "min_workers": 1}
    )
    assert config.group_sizes == [1, 2, 3, 4, 6, 8, 12]
    for step in range(4):
        expected = ids_of_step(config.with_workers(1), tokens, step)
        for size in config.group_sizes[1:]:
            assert ids_of_step(config.with_workers(size), tokens, step) == expected


def cluster(*cpus: float) -> list[ClusterNode]:
    return [ClusterNode({"CPU": amount}) for amount in cpus]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def chosen(
    free: Callable[[float], Sequence[ClusterNode]], machines: Sequence[ClusterNode], may_grow: bool = True
) -> tuple[int, float]:
    """The size for 1, 2, 3, 4 or 6 workers of a core each, and the seconds until it was chosen."""
    clock, resources = Clock(), Resources(num_workers=6, min_workers=2, placement_timeout_s=100)
    size = choose_size([2, 3, 4, 6], resources, lambda: free(clock.now), lambda: machines, may_grow, clock.sleep, clock)
    return size, clock.now


def test_the_whole_group_starts_at_once_where_it_fits() -> None:
    assert chosen(lambda now: cluster(4, 3), cluster(4, 3)) == (6, 0.0)


def test_a_smaller_group_starts_after_a_grace_with_the_largest_size_that_divides_the_batch() -> None:
    assert chosen(lambda now: cluster(4, 1.5), cluster(4, 1.5)) == (4, GRACE_S)


def test_room_that_is_set_free_within_the_grace_is_taken() -> None:
    assert chosen(lambda now: cluster(3, 3 if now >= 5 else 0), cluster(3, 3)) == (6, 5.0)


def test_larger_sizes_than_a_closed_cluster_holds_are_not_waited_for() -> None:
    assert chosen(lambda now: cluster(3), cluster(3), may_grow=False) == (3, 0.0)
    assert chosen(lambda now: cluster(2 if now < 3 else 3), cluster(3), may_grow=False) == (3, 3.0)


def test_the_smallest_group_is_waited_for_longer_and_then_refused() -> None:
    assert chosen(lambda now: cluster(1 if now < 50 else 2), cluster(2)) == (2, 50.0)
    with pytest.raises(InfrastructureError, match=r"room for 2 workers.*min_workers=2"):
        chosen(lambda now: cluster(1), cluster(8))


def test_without_min_workers_there_is_nothing_to_choose() -> None:
    assert choose_size([4], Resources(num_workers=4), cluster, cluster, may_grow=True) == 4


class _Rest:
    """The placement group of the missing workers."""

    def __init__(self, granted: bool) -> None:
        self.granted = granted

    def wait(self, timeout_seconds: float) -> bool:
        return self.granted


@pytest.mark.parametrize(
    ("granted", "free", "is_asked"),
    [(True, cluster(), True), (False, cluster(1), True), (False, cluster(0.5), False)],
    ids=["all that were missing", "one more", "not one more"],
)
def test_the_workers_are_asked_to_leave_when_there_is_room_for_a_larger_group(
    monkeypatch: pytest.MonkeyPatch, granted: bool, free: list[ClusterNode], is_asked: bool
) -> None:
    asked_for: list[int] = []
    looks: list[int] = []

    @contextmanager
    def asking(resources: Resources, num_workers: int) -> Iterator[_Rest]:
        asked_for.append(num_workers)
        yield _Rest(granted)

    def list_free() -> list[ClusterNode]:
        looks.append(1)
        return free

    monkeypatch.setattr(group, "asked_for", asking)
    monkeypatch.setattr(group, "free_nodes", list_free)
    monkeypatch.setattr(group, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(group, "_POLL_S", 0.001)
    resources, asked, begun = Resources(num_workers=6, min_workers=2), threading.Event(), iter(range(100))
    with growing([2, 3, 4, 6], 2, resources, after_s=0, num_begun=lambda: next(begun), ask=asked.set):
        if is_asked:
            assert asked.wait(60)
        else:
            wait_until(lambda: len(looks) > 20)
            assert not asked.is_set()
    assert asked_for == [4]
    assert next(begun) == 3, "it looked for room only when both workers had begun"


def test_nobody_looks_for_room_for_more_than_all() -> None:
    with growing([2, 6], 6, Resources(num_workers=6), after_s=0, num_begun=lambda: 6, ask=lambda: pytest.fail("asked")):
        assert "room for more workers" not in {thread.name for thread in threading.enumerate()}
