"""Room for the workers is checked before anything waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import UserError
from pipelines.engine.placement import (
    ClusterNode,
    Demand,
    num_places,
    remaining,
    too_small,
    wait_for_room,
    why_no_room,
)
from pipelines.engine.stage import Resources


def test_a_worker_must_fit_whole_on_one_node() -> None:
    nodes = [ClusterNode({"CPU": 3.0}), ClusterNode({"CPU": 3.0})]
    assert num_places(Resources(num_workers=3, cpus_per_worker=2), nodes) == 2


def test_impossible_placement_says_what_is_asked_and_what_is_there() -> None:
    with pytest.raises(UserError, match=r"4 training workers ask for 1 CPU and 1 GPU each.*room for 2.*8 CPU, 2 GPU"):
        wait_for_room(
            Demand(Resources(num_workers=4, gpus_per_worker=1), fewest=4),
            lambda: [ClusterNode({"CPU": 8.0, "GPU": 2.0})],
            can_grow=False,
        )


def test_of_tasks_one_must_fit() -> None:
    tasks = Demand(Resources(num_workers=9, cpus_per_worker=3), fewest=1)
    wait_for_room(tasks, lambda: [ClusterNode({"CPU": 4.0})], can_grow=False)
    with pytest.raises(UserError, match=r"one worker asks for 3 CPU, and the cluster has room for none \(nodes: 2 CPU"):
        wait_for_room(tasks, lambda: [ClusterNode({"CPU": 2.0})], can_grow=False)


class Asking:
    """An autoscaler that is asked; counts the times."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def __call__(self) -> Asking:
        return self

    def __enter__(self) -> None:
        self.begun += 1

    def __exit__(self, *_: object) -> None:
        self.ended += 1


FOUR = Demand(Resources(num_workers=4, placement_timeout_s=30), fewest=4)


def test_a_growing_cluster_is_asked_once_and_waited_for() -> None:
    sizes = iter([1.0, 1.0, 4.0])
    naps: list[float] = []
    asking = Asking()
    wait_for_room(FOUR, lambda: [ClusterNode({"CPU": next(sizes)})], can_grow=True, ask=asking, sleep=naps.append)
    assert len(naps) == 2
    assert (asking.begun, asking.ended) == (1, 1)


def test_where_there_is_room_nobody_is_asked() -> None:
    asking = Asking()
    wait_for_room(FOUR, lambda: [ClusterNode({"CPU": 4.0})], can_grow=True, ask=asking)
    assert asking.begun == 0


def test_waiting_ends_with_an_error() -> None:
    times = iter([0.0, 10.0, 20.0, 31.0])
    asking = Asking()
    with pytest.raises(UserError, match="or add nodes"):
        wait_for_room(
            FOUR,
            lambda: [ClusterNode({"CPU": 1.0})],
            can_grow=True,
            ask=asking,
            sleep=lambda _: None,
            clock=lambda: next(times),
        )
    assert (asking.begun, asking.ended) == (1, 1)


def test_labels_and_other_resources_count() -> None:
    nodes = [ClusterNode({"CPU": 8.0, "disk": 2.0}, {"market": "spot"}), ClusterNode({"CPU": 8.0}, {"market": "fixed"})]
    assert num_places(Resources(node_labels={"market": "fixed"}), nodes) == 8
    assert num_places(Resources(custom_per_worker={"disk": 1.0}), nodes) == 2
    assert num_places(Resources(neuron_cores_per_worker=1), nodes) == 0


def test_neuron_cores_that_ray_was_not_told_of_are_named_with_the_command() -> None:
    cores, cpus = Demand(Resources(num_workers=2, neuron_cores_per_worker=1), 2), Demand(Resources(num_workers=99), 99)
    without, too_few = ClusterNode({"CPU": 8.0}), ClusterNode({"CPU": 8.0, "neuron_cores": 1.0})
    said = too_small(cores, [without])
    assert "2 training workers ask for 1 CPU and 1 neuron_cores each, and the cluster has room for none" in said
    assert """start Ray on each with their number, ray start ... --resources='{"neuron_cores": 64}'""" in said
    assert "room for 1 of them (nodes: 8 CPU, 0 GPU, 1 neuron_cores)" in (said := too_small(cores, [too_few]))
    assert "ray start" not in said + too_small(cpus, [without])


def test_a_stage_starts_only_if_it_fits_beside_the_others_or_is_alone() -> None:
    nodes = [ClusterNode({"CPU": 2.0}), ClusterNode({"CPU": 2.0})]
    two, four = Demand(Resources(num_workers=2), 2), Demand(Resources(num_workers=4), 4)
    tasks = Demand(Resources(num_workers=9), 1)
    assert why_no_room(two, [], nodes) is None
    assert why_no_room(two, [two], nodes) is None
    assert why_no_room(four, [], [ClusterNode({"CPU": 1.0})]) is None, "alone, it may wait for room itself"
    reason = why_no_room(four, [two], nodes)
    assert reason is not None
    assert "asks for 4 x 1 CPU; the cluster has 2 CPU, 0 GPU; 2 CPU, 0 GPU" in reason
    assert why_no_room(two, [tasks], nodes) is not None, "tasks take all the room they get"
    assert why_no_room(tasks, [two], nodes) is None, "one task at a time is enough"


amounts_of = st.fixed_dictionaries(
    {"CPU": st.integers(0, 8).map(float)}, optional={"GPU": st.integers(0, 4).map(float)}
)
nodes_there = st.lists(amounts_of.map(ClusterNode), max_size=4)
demands = st.builds(
    lambda workers, cpus, gpus, all_at_once: Demand(
        Resources(num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus), workers if all_at_once else 1
    ),
    st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(),
)  # fmt: skip


@given(demand=demands, nodes=nodes_there)
def test_a_stage_alone_is_always_admitted(demand: Demand, nodes: list[ClusterNode]) -> None:
    assert why_no_room(demand, [], nodes) is None


@given(demands=st.lists(demands, max_size=6), nodes=nodes_there)
def test_what_is_admitted_beside_others_fits(demands: list[Demand], nodes: list[ClusterNode]) -> None:
    held: list[Demand] = []
    for demand in demands:
        if why_no_room(demand, held, nodes) is None:
            held.append(demand)
    left = remaining(nodes, held)
    assert all(amount >= -1e-9 for node in left for amount in node.resources.values()), "nothing is promised twice"
    if len(held) > 1:
        fewest = {
            resource: sum(one.fewest * one.resources.bundle().get(resource, 0.0) for one in held)
            for resource in ("CPU", "GPU")
        }
        first = held[0]  # alone at first, it may ask for more than there is
        if num_places(first.resources, nodes) >= first.fewest:
            for resource, amount in fewest.items():
                assert amount <= sum(node.resources.get(resource, 0.0) for node in nodes) + 1e-6


@given(demand=demands, held=st.lists(demands, min_size=1, max_size=3), nodes=nodes_there)
def test_more_nodes_never_take_room_away(demand: Demand, held: list[Demand], nodes: list[ClusterNode]) -> None:
    if why_no_room(demand, held, nodes) is None:
        assert why_no_room(demand, held, [*nodes, ClusterNode({"CPU": 64.0, "GPU": 64.0})]) is None


@given(demand=demands, others=st.lists(demands, min_size=1, max_size=3), nodes=nodes_there)
def test_the_reason_is_the_same_while_others_come_and_go(
    demand: Demand, others: list[Demand], nodes: list[ClusterNode]
) -> None:
    reasons = {why_no_room(demand, held, nodes) for held in (others, others[:1])} - {None}
    assert len(reasons) <= 1, "what is told once is not told again"
    assert all(f"asks for {demand.fewest} x " in str(reason) for reason in reasons)


def test_work_in_one_thread_takes_a_core_beside_accelerators_and_a_worker_without() -> None:
    beside = Resources(num_workers=2, cpus_per_worker=8, gpus_per_worker=1).without_accelerators()
    assert beside == Resources(num_workers=1, cpus_per_worker=1)
    assert Resources(cpus_per_worker=0.5, neuron_cores_per_worker=1).without_accelerators().bundle() == {"CPU": 0.5}
    plain = Resources(num_workers=2, cpus_per_worker=8)
    assert plain.without_accelerators() == plain
