"""Resources of a stage in the words of Ray, and the machines of the cluster in ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.engine.placement import ClusterNode, Demand, too_small, wait_for_room
from pipelines.engine.stage import Resources

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger(__name__)


def task_options(resources: Resources) -> dict[str, Any]:
    """Options of ray.remote for one worker."""
    bundle = resources.bundle()
    options: dict[str, Any] = {"num_cpus": bundle.pop("CPU")}
    if "GPU" in bundle:
        options["num_gpus"] = bundle.pop("GPU")
    if bundle:
        options["resources"] = bundle
    if resources.node_labels:
        options["label_selector"] = dict(resources.node_labels)
    return options


def alive_nodes() -> list[ClusterNode]:
    """The machines of the cluster that this process is connected to, with all that they have.

    Those that will be taken away soon are left out: Ray starts nothing on them any more.
    """
    return [ClusterNode(node["Resources"], node.get("Labels") or {}) for node in _lasting_nodes()]


def free_nodes() -> list[ClusterNode]:
    """The same machines with what nobody has taken. Ray knows of changes a little later."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [ClusterNode(free.get(node["NodeID"], {}), node.get("Labels") or {}) for node in _lasting_nodes()]


def _lasting_nodes() -> list[Any]:
    import ray
    from ray._private.state import state

    draining = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def can_grow() -> bool:
    """Whether machines may join the cluster: not one that this machine alone can reach, as those are that we start."""
    import ray

    return not str(ray.get_runtime_context().gcs_address).startswith("127.")


def wait_for_machines(demand: Demand, may_come_back: bool = False) -> None:
    """Return when the cluster's machines could hold the workers.

    Meanwhile an autoscaler sees what is missing.

    Args: may_come_back: the workers had room before; a lost machine may come back.
    Raises: UserError: no such machines, after placement_timeout_s or at once.
    """
    wait_for_room(demand, alive_nodes, can_grow=may_come_back or can_grow(), ask=lambda: _waiting(demand))


@contextmanager
def _waiting(demand: Demand) -> Iterator[None]:
    log.warning(
        "Waiting for machines, at most %g s. %s", demand.resources.placement_timeout_s, too_small(demand, alive_nodes())
    )
    with asked_for(demand.resources, demand.fewest):
        yield


@contextmanager
def asked_for(resources: Resources, num_workers: int) -> Iterator[PlacementGroup]:
    """Hold a placement group of so many workers: autoscalers make machines for one that none can hold yet."""
    from ray.util import placement_group, remove_placement_group

    labels = dict(resources.node_labels)
    group = placement_group(
        [resources.bundle()] * num_workers,
        bundle_label_selector=[labels] * num_workers if labels else None,
    )
    try:
        yield group
    finally:
        remove_placement_group(group)
