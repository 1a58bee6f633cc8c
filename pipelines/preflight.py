"""Checks of what a pipeline asks of this machine, made by `plan` and by `run` before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from pipelines.cluster import cluster_address
from pipelines.config import ClusterConfig
from pipelines.engine.stage import AnyNode, Machines
from pipelines.errors import ConfigError, FieldError

SLOTS_PER_CORE = 16  # CPU slots are Ray's bookkeeping and may exceed the cores; this many more is a mistake
FEWEST_SLOTS = 64  # allowed on any machine


def check_pipeline(cluster: ClusterConfig, graph: Iterable[AnyNode]) -> None:
    """Refuse what must fail later: unknown kernels, a local cluster that is too small, steps beyond its memory.

    Raises: ConfigError: names the field, what it asks, what there is and what would do.
    """
    graph = list(graph)
    _check_kernels(on_neuron=any(node.config.resources.neuron_cores_per_worker for node in graph))
    if cluster_address(cluster) == "local":
        for node in graph:
            _check_local_cpus(cluster, node)
            _check_local_gpus(node)
            _check_local_neuron_cores(node)
            node.stage.check_memory(node, Machines(num_cores=float(os.cpu_count() or 1)))


def cores_of(cluster: ClusterConfig) -> float:
    """Cores that workers can have together: this machine's; of a cluster elsewhere no limit is known."""
    return float(os.cpu_count() or 1) if cluster.address == "local" else math.inf


def _check_kernels(on_neuron: bool) -> None:
    asked = os.environ.get("BMOJO_KERNELS")
    if asked is None:
        return
    from kernels.operator import PATHS  # imports torch: seconds

    if asked not in PATHS:
        raise ConfigError(f"BMOJO_KERNELS={asked!r}: there are no such kernels. Set it to one of {', '.join(PATHS)}.")
    if on_neuron and asked in ("triton", "cpp"):
        raise ConfigError(
            f"BMOJO_KERNELS={asked}: these kernels do not run on NeuronCores. Unset it, or set it to static."
        )


def _check_local_cpus(cluster: ClusterConfig, node: AnyNode) -> None:
    resources = node.config.resources
    workers, cpus = resources.num_workers, resources.cpus_per_worker
    at_once = (
        resources.fewest_together if node.stage.uses_ray_train else 1
    )  # other stages' tasks can wait for one another
    cores = os.cpu_count() or 1
    limit = cluster.num_cpus
    if limit is not None and at_once * cpus > limit:
        raise FieldError(
            ("stages", node.name, "resources"),
            f"{at_once} workers of {cpus:g} CPUs do not fit into cluster.num_cpus={limit}. Lower num_workers or "
            "cpus_per_worker, or raise cluster.num_cpus.",
        )
    most = limit or max(FEWEST_SLOTS, SLOTS_PER_CORE * cores)
    if limit is None and workers * cpus > most:
        raise FieldError(
            ("stages", node.name, "resources"),
            f"{workers} workers of {cpus:g} CPUs are far more than this machine's {cores} cores can run "
            f"(cluster.address is local; at most {most} CPUs are accepted). Lower num_workers or cpus_per_worker, or "
            "set cluster.address to a cluster that has them.",
        )


def _check_local_gpus(node: AnyNode) -> None:
    resources = node.config.resources
    gpus = resources.gpus_per_worker
    if not gpus:
        return
    from pipelines.stages.train.device import num_gpus  # imports torch: seconds, which only GPUs need to wait for

    present = num_gpus()
    workers = resources.fewest_together if node.stage.uses_ray_train else 1
    needed = workers * gpus
    if needed > present:
        raise FieldError(
            ("stages", node.name, "resources", "gpus_per_worker"),
            f"found {gpus:g} for each of {workers} workers, but this machine has {present} GPUs (cluster.address is "
            "local). Set it to 0 to run on the CPU, or cluster.address to a cluster that has them.",
        )


def _check_local_neuron_cores(node: AnyNode) -> None:
    resources = node.config.resources
    if not resources.neuron_cores_per_worker:
        return
    from pipelines.neuron import runtime  # imports torch, as above

    try:
        runtime.require()
    except runtime.NeuronUnavailableError as error:
        raise FieldError(("stages", node.name, "resources", "neuron_cores_per_worker"), str(error)) from error
    workers = resources.fewest_together if node.stage.uses_ray_train else 1
    needed, present = workers * resources.neuron_cores_per_worker, runtime.num_cores()
    if needed > present:
        raise FieldError(
            ("stages", node.name, "resources", "neuron_cores_per_worker"),
            f"found {resources.neuron_cores_per_worker:g} for each of {workers} workers, but neuron-ls counts "
            f"{present} logical NeuronCores on this machine (cluster.address is local). Lower num_workers, look at "
            "neuron-ls, or set cluster.address to a cluster that was started with their number (docs/neuron.md).",
        )
