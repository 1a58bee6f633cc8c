"""Room in a cluster: whether workers fit, beside what others hold. Pure arithmetic; no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

from base.errors import UserError
from pipelines.engine.stage import AnyNode, Resources

_EPSILON = 1e-9
_POLL_S = 2.0


@dataclass(frozen=True)
class ClusterNode:
    """One machine of the cluster: its resources as Ray names them, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """What a stage holds of the cluster while it runs. `fewest` of its workers must fit at once."""

    resources: Resources
    fewest: int

    @classmethod
    def of(cls, node: AnyNode) -> Demand | None:
        """The demand of a stage; None if it does not work on the cluster."""
        if not node.stage.uses_cluster:
            return None
        resources = node.config.resources
        return cls(resources, resources.fewest_together if node.stage.uses_ray_train else 1)


def num_places(resources: Resources, nodes: Sequence[ClusterNode]) -> int:
    """Number of workers the nodes could hold, each worker whole on one node."""
    return sum(_places(resources, node) for node in nodes)


def remaining(nodes: Sequence[ClusterNode], held: Iterable[Demand]) -> list[ClusterNode]:
    """What the nodes have left beside what is held, each worker put where it first fits."""
    left = [ClusterNode(dict(node.resources), node.labels) for node in nodes]
    for demand in held:
        for _ in range(demand.resources.num_workers):
            place = next((index for index, node in enumerate(left) if _places(demand.resources, node)), None)
            if place is None:
                break  # the rest of its tasks wait for its own
            bundle = demand.resources.bundle()
            there = left[place]
            left[place] = ClusterNode(
                {name: amount - bundle.get(name, 0.0) for name, amount in there.resources.items()}, there.labels
            )
    return left


def why_no_room(demand: Demand, held: Sequence[Demand], nodes: Sequence[ClusterNode]) -> str | None:
    """Why the stage should not start beside the running stages (`held`); None: it should.

    One that holds nothing beside it starts in any case: it may wait for room that others hold, or that will come. The
    reason does not name them: it stays the same, and is told once, while they come and go.
    """
    if not held or num_places(demand.resources, remaining(nodes, held)) >= demand.fewest:
        return None
    return (
        f"waits for room beside the running stages: asks for {demand.fewest} x "
        f"{amounts(demand.resources.bundle())}; the cluster has {described(nodes)}"
    )


def wait_for_room(
    demand: Demand,
    list_nodes: Callable[[], Sequence[ClusterNode]],
    can_grow: bool,
    ask: Callable[[], AbstractContextManager[object]] = nullcontext,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the nodes there are, empty of other work, could hold the fewest workers of the demand.

    Args:
        can_grow: nodes may join, so that waiting up to placement_timeout_s makes sense.
        ask: entered while it waits: tells an autoscaler what is missing.
    Raises: UserError: they cannot; says what is asked and what there is.
    """
    resources = demand.resources
    deadline = clock() + resources.placement_timeout_s
    with ExitStack() as asking:
        while num_places(resources, nodes := list_nodes()) < demand.fewest:
            if not can_grow or clock() >= deadline:
                raise UserError(too_small(demand, nodes))
            asking.enter_context(ask())
            ask = nullcontext  # once is enough
            sleep(_POLL_S)


def too_small(demand: Demand, nodes: Sequence[ClusterNode]) -> str:
    """The error message: asked, there, next step."""
    resources, places = demand.resources, num_places(demand.resources, nodes)
    whom = f"{demand.fewest} training workers ask" if demand.fewest > 1 else "one worker asks"
    return (
        f"resources: {whom} for {asked(resources)}{' each' if demand.fewest > 1 else ''}, and the cluster has room for "
        f"{f'{places} of them' if places else 'none'} (nodes: {described(nodes)}). Lower resources.num_workers, "
        "cpus_per_worker or gpus_per_worker, raise cluster.num_cpus for a local cluster, or add nodes."
        f"{_cores_by_hand(demand, nodes)}"
    )


def _cores_by_hand(demand: Demand, nodes: Sequence[ClusterNode]) -> str:
    """What to do about NeuronCores that Ray did not find; it counts them where neuron-ls is."""
    if not demand.resources.neuron_cores_per_worker or any(_neuron(node.resources) for node in nodes):
        return ""
    return (
        " No node has neuron_cores: start Ray on each with their number, ray start ... "
        "--resources='{\"neuron_cores\": 64}' (docs/neuron.md)."
    )


def asked(resources: Resources) -> str:
    """What one worker asks for, in words."""
    labels = ", ".join(f"{name}={value}" for name, value in resources.node_labels.items())
    return amounts(resources.bundle()) + (f" on a node with {labels}" if labels else "")


def described(nodes: Sequence[ClusterNode]) -> str:
    """What nodes there are, in words."""
    named = ("CPU", "GPU", "neuron_cores")
    shown = [{name: node.resources.get(name, 0.0) for name in named} for node in nodes]
    return "; ".join(f"{node['CPU']:g} CPU, {node['GPU']:g} GPU" + _neuron(node) for node in shown) or "none"


def amounts(bundle: Mapping[str, float]) -> str:
    """Resources in words."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())


def _neuron(node: Mapping[str, float]) -> str:
    cores = node.get("neuron_cores", 0.0)
    return f", {cores:g} neuron_cores" if cores else ""


def _places(resources: Resources, node: ClusterNode) -> int:
    if any(node.labels.get(name) != value for name, value in resources.node_labels.items()):
        return 0
    need = resources.bundle()
    return min(int(node.resources.get(kind, 0.0) / amount + _EPSILON) for kind, amount in need.items())
