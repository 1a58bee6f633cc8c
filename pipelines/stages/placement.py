"""Room for the workers: checked before anything waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from base.errors import UserError
from pipelines.engine.stage import Resources

NodeResources = Mapping[str, float]


def wait_for_room(
    resources: Resources,
    list_nodes: Callable[[], Sequence[NodeResources]],
    can_grow: bool,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the nodes there are, empty of other work, could hold the workers.

    Args: can_grow: an autoscaler may add nodes, so that waiting up to placement_timeout_s makes sense.
    Raises: UserError: they cannot; says what is asked and what there is.
    """
    deadline = clock() + resources.placement_timeout_s
    while num_places(resources, nodes := list_nodes()) < resources.num_workers:
        if not can_grow or clock() >= deadline:
            raise UserError(too_small(resources, nodes))
        sleep(2.0)


def num_places(resources: Resources, nodes: Sequence[NodeResources]) -> int:
    """Number of workers the nodes could hold, each worker whole on one node."""
    need = worker_bundle(resources)
    return sum(min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in need.items()) for node in nodes)


def worker_bundle(resources: Resources) -> dict[str, float]:
    """Resources that one worker reserves, as Ray names them."""
    bundle = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        bundle["GPU"] = float(resources.gpus_per_worker)
    return bundle


def too_small(resources: Resources, nodes: Sequence[NodeResources]) -> str:
    """The error message: asked, there, next step."""
    asked = " and ".join(f"{amount:g} {kind}" for kind, amount in worker_bundle(resources).items())
    there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes) or "none"
    return (
        f"resources: {resources.num_workers} training workers ask for {asked} each, and the cluster has room for "
        f"{num_places(resources, nodes)} of them (nodes: {there}). Lower resources.num_workers, cpus_per_worker or "
        "gpus_per_worker, raise cluster.num_cpus for a local cluster, or add nodes."
    )
