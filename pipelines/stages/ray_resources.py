"""Resources of a stage in the words of Ray, and the machines of the cluster in ours."""

from __future__ import annotations

from typing import Any

from pipelines.engine.placement import ClusterNode
from pipelines.engine.stage import Resources


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
