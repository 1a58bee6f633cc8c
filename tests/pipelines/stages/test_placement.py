"""Room for the workers is checked before anything waits."""

from __future__ import annotations

import pytest

from base.errors import UserError
from pipelines.engine.stage import Resources
from pipelines.stages.placement import num_places, wait_for_room


def test_a_worker_must_fit_whole_on_one_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    assert num_places(Resources(num_workers=3, cpus_per_worker=2), nodes) == 2


def test_impossible_placement_says_what_is_asked_and_what_is_there() -> None:
    with pytest.raises(UserError, match=r"4 training workers ask for 1 CPU and 1 GPU each.*room for 2.*8 CPU, 2 GPU"):
        wait_for_room(Resources(num_workers=4, gpus_per_worker=1), lambda: [{"CPU": 8.0, "GPU": 2.0}], can_grow=False)


def test_a_growing_cluster_is_waited_for() -> None:
    sizes = iter([1.0, 1.0, 4.0])
    naps: list[float] = []
    wait_for_room(Resources(num_workers=4), lambda: [{"CPU": next(sizes)}], can_grow=True, sleep=naps.append)
    assert len(naps) == 2


def test_waiting_ends_with_an_error() -> None:
    times = iter([0.0, 10.0, 20.0, 31.0])
    with pytest.raises(UserError, match="or add nodes"):
        wait_for_room(
            Resources(num_workers=4, placement_timeout_s=30),
            lambda: [{"CPU": 1.0}],
            can_grow=True,
            sleep=lambda _: None,
            clock=lambda: next(times),
        )
