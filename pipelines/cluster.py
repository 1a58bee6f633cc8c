"""The Ray cluster a run works on: started on this machine, or joined."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.config import ClusterConfig
from pipelines.errors import UserError
from pipelines.stages.base import StageConfig
from pipelines.tracking.environment import TELEMETRY_OFF

REPOSITORY = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20  # stages pass paths, never data, so little is needed
LOOPBACK_ONLY = {  # for a cluster of this machine alone: nothing listens to the network
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name, on every system: the node's address is 127.0.0.1
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}
PACKAGES = ("bmojo", "data", "kernels", "pipelines")


def ensure_cluster(config: ClusterConfig, stages: Iterable[StageConfig]) -> None:
    """Start or join the Ray cluster, once a process.

    Raises: UserError: the address cannot be reached, or Ray does not start here.
    """
    if config.address == "local":
        for name, value in LOOPBACK_ONLY.items():
            os.environ.setdefault(name, value)  # Ray reads these once, when it is imported
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        if config.address == "local":
            _start_local(config.num_cpus or _cpus_for(stages))
        else:
            _join(config.address)
    except (ConnectionError, TimeoutError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.address={config.address}: no Ray cluster there or none could be started ({error}). "
            "Check the address (`ray status` on the head node), or set cluster.address=local. A cluster that asks for "
            "a token, as Ray's do where one exists, needs RAY_AUTH_MODE=token here and the token in ~/.ray/auth_token."
        ) from error


def _cpus_for(stages: Iterable[StageConfig]) -> int:
    """CPU slots so that the largest stage fits; slots are Ray's bookkeeping, the system shares the cores."""
    asked = [stage.resources.num_workers * stage.resources.cpus_per_worker for stage in stages]
    return max(os.cpu_count() or 1, *(math.ceil(cpus) for cpus in asked))


def _start_local(num_cpus: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,  # the run's own log files keep the workers' output
    )


def _join(address: str) -> None:
    import ray

    runtime_env: dict[str, Any] = {"env_vars": TELEMETRY_OFF}
    if address != "auto":  # other machines get our packages; this one has them
        runtime_env |= {"working_dir": str(REPOSITORY), "excludes": _not_shipped()}
    ray.init(address=address, runtime_env=runtime_env, logging_level=logging.ERROR, log_to_driver=False)


def _not_shipped() -> list[str]:
    """Everything at the top of the checkout but our packages: data, runs and the environment stay here."""
    return [f"/{entry.name}" for entry in REPOSITORY.iterdir() if entry.name not in PACKAGES]
