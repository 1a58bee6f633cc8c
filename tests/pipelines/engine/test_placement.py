"""Room for the workers is checked before anything waits."""

from __future__ import annotations

import pytest

from base.errors import UserError
from pipelines.engine.placement import ClusterNode, Demand, num_places, wait_for_room, why_no_room
from pipelines.engine.stage import Resources


def test_a_worker_must_fit_whole_on_one_node() -> None:
    nodes = [ClusterNode({"CPU": 3.0}), ClusterNode({"CPU": 3.0})]
    assert num_places(Resources(num_workers=3, cpus_per_worker=2), nodes) == 2


def test_impossible_placement_says_what_is_asked_and_what_is_there() -> None:
    with pytest.raises(UserError, match=r"4 training workers ask for 1 CPU and 1 GPU each.*room for 2.*8 CPU, 2 GPU"):
        wait_for_room(
            Resources(num_workers=4, gpus_per_worker=1), lambda: [ClusterNode({"CPU": 8.0, "GPU": 2.0})], can_grow=False
        )


def test_a_growing_cluster_is_waited_for() -> None:
    sizes = iter([1.0, 1.0, 4.0])
    naps: list[float] = []
    wait_for_room(
        Resources(num_workers=4), lambda: [ClusterNode({"CPU": next(sizes)})], can_grow=True, sleep=naps.append
    )
    assert len(naps) == 2


def test_waiting_ends_with_an_error() -> None:
    times = iter([0.0, 10.0, 20.0, 31.0])
    with pytest.raises(UserError, match="or add nodes"):
        wait_for_room(
            Resources(num_workers=4, placement_timeout_s=30),
            lambda: [ClusterNode({"CPU": 1.0})],
            can_grow=True,
            sleep=lambda _: None,
            clock=lambda: next(times),
        )


def test_labels_and_other_resources_count() -> None:
    nodes = [ClusterNode({"CPU": 8.0, "disk": 2.0}, {"market": "spot"}), ClusterNode({"CPU": 8.0}, {"market": "fixed"})]
    assert num_places(Resources(node_labels={"market": "fixed"}), nodes) == 8
    assert num_places(Resources(custom_per_worker={"disk": 1.0}), nodes) == 2
    assert num_places(Resources(neuron_cores_per_worker=1), nodes) == 0


def test_a_stage_starts_only_if_it_fits_beside_the_others_or_is_alone() -> None:
    nodes = [ClusterNode({"CPU": 2.0}), ClusterNode({"CPU": 2.0})]
    two, four = Demand(Resources(num_workers=2), 2), Demand(Resources(num_workers=4), 4)
    tasks = Demand(Resources(num_workers=9), 1)
    assert why_no_room(two, {}, nodes) is None
    assert why_no_room(two, {"a": two}, nodes) is None
    assert why_no_room(four, {}, [ClusterNode({"CPU": 1.0})]) is None, "alone, it may wait for room itself"
    reason = why_no_room(four, {"a": two}, nodes)
    assert reason is not None
    assert "asks for 4 x 1 CPU; the cluster has 2 CPU, 0 GPU; 2 CPU, 0 GPU, of which a holds a part" in reason
    assert why_no_room(two, {"a": tasks}, nodes) is not None, "tasks take all the room they get"
    assert why_no_room(tasks, {"a": two}, nodes) is None, "one task at a time is enough"
