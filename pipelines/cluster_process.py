"""The process that keeps a run's Ray cluster: `python -m pipelines.cluster_process`, started by RayCluster.

It starts or joins the cluster and then says now and then what machines there are, on its standard output; a local
cluster lives as long as this process. It ends when its standard input does, which is when the scheduler is gone, or
when the cluster has died. So the scheduler itself never connects to Ray, and outlives it.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from typing import Any

import psutil

from base.config import StrictConfig
from pipelines.cluster import cluster_address, ensure_cluster
from pipelines.config import ClusterConfig
from pipelines.engine.failures import Failure, classify
from pipelines.shared_storage import check_shared_storage
from pipelines.tracking.environment import quiet_environment

LOOK_S = 2.0
_DAEMONS = ("gcs_server", "raylet")


class ClusterRequest(StrictConfig):
    """What is asked of the process, in one line of JSON on its standard input."""

    cluster: ClusterConfig
    num_cpus: int  # of a local cluster
    num_neuron_cores: int  # of a local cluster; 0: those that Ray finds
    storage: str  # that all its machines must see


class MachineReport(StrictConfig):
    """One machine of the cluster."""

    resources: dict[str, float]
    labels: dict[str, str]


class ClusterReport(StrictConfig):
    """A line of the process on its standard output."""

    address: str | None = None  # for others on this machine to join
    machines: tuple[MachineReport, ...] = ()
    failure: Failure | None = None


def main() -> None:
    """Keep the cluster until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not for the scheduler
    quiet_environment()
    request = ClusterRequest.model_validate_json(sys.stdin.readline())
    try:
        ensure_cluster(request.cluster, request.num_cpus, request.num_neuron_cores)
        check_shared_storage(request.storage)
        _keep(request.cluster, answers)
    except BaseException as error:
        with suppress(BrokenPipeError):
            print(ClusterReport(failure=classify(error)).model_dump_json(), file=answers)
    finally:
        import ray

        with suppress(BaseException):
            ray.shutdown()
        os._exit(0)


def _keep(config: ClusterConfig, answers: Any) -> None:
    import ray

    address = cluster_address(config)
    daemons = [] if address != "local" else _daemons()
    if address == "local":
        address = ray.get_runtime_context().gcs_address
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in daemons):
        machines = tuple(
            MachineReport(resources=_numbers(node["Resources"]), labels=node.get("Labels") or {})
            for node in ray.nodes()
            if node["Alive"]
        )
        print(ClusterReport(address=address, machines=machines).model_dump_json(), file=answers)
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_S)
        if readable and not sys.stdin.readline():
            return


def _daemons() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() in _DAEMONS]


def _numbers(resources: dict[str, Any]) -> dict[str, float]:
    return {name: float(amount) for name, amount in resources.items()}


if __name__ == "__main__":
    main()
