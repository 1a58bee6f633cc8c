"""Resources of a stage in the words of Ray, and the machines of the cluster in ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.engine.placement import ClusterNode, Demand, too_small, wait_for_room
from pipelines.engine.stage import Resources

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
    """The machines of the cluster that this process is connected to, with all that they have."""
    import ray

    return [ClusterNode(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def wait_for_machines(demand: Demand, may_come_back: bool = False) -> None:
    """Return when the cluster's machines could hold the workers.

    Meanwhile an autoscaler sees what is missing. Machines may join any cluster but one that this machine alone can
    reach, as those are that we start.

    Args: may_come_back: the workers had room before; a lost machine may come back.
    Raises: UserError: no such machines, after placement_timeout_s or at once.
    """
    import ray

    is_this_machine = str(ray.get_runtime_context().gcs_address).startswith("127.")
    wait_for_room(demand, alive_nodes, can_grow=may_come_back or not is_this_machine, ask=lambda: _asking(demand))


@contextmanager
def _asking(demand: Demand) -> Iterator[None]:
    """Hold a placement group that no machines can hold yet: autoscalers make machines for those."""
    from ray.util import placement_group, remove_placement_group

    resources = demand.resources
    log.warning(
        "Waiting for machines, at most %g s. %s", resources.placement_timeout_s, too_small(demand, alive_nodes())
    )
    labels = dict(resources.node_labels)
    group = placement_group(
        [resources.bundle()] * demand.fewest,
        bundle_label_selector=[labels] * demand.fewest if labels else None,
    )
    try:
        yield
    finally:
        remove_placement_group(group)
