"""All that training writes into os.environ, and why; no other module of this folder writes there (tested)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipelines.engine.stage import Resources
from pipelines.stages.train.config import TrainStageConfig


@contextmanager
def ray_train_settings(resources: Resources) -> Iterator[None]:
    """Set what Ray Train reads from the driver's environment only, around `fit`; put back what was there before."""
    settings = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resources.placement_timeout_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def set_worker_environment(config: TrainStageConfig) -> None:
    """Set what libraries read from a worker's environment when they are imported or first used.

    A worker is a process of its own that ends with training, so nothing is put back.
    """
    os.environ.update(config.backend.environment(config.on_gpu))
    if config.on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    else:
        os.environ["OMP_NUM_THREADS"] = str(config.threads_per_worker)  # of C++ operators and of child processes


def current_environment() -> dict[str, str]:
    """A copy of what is set now."""
    return dict(os.environ)


def change_environment(values: Mapping[str, str | None]) -> None:
    """Set what a process group's library reads when it is imported, and remove what it may not find (None).

    In a worker, which is a process of its own.
    """
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def set_rank(rank: int, num_workers: int) -> None:
    """Set what DeepSpeed reads of a worker's place, as Ray Train does it. All workers are on this machine."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)})


def environment_of_one_gpu(number: int, num_gpus: int) -> dict[str, str]:
    """The environment of a process that is to see one of the GPUs that this one sees. Args: number: from 0."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = asked.split(",") if asked else [str(gpu) for gpu in range(num_gpus)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible[number]}
