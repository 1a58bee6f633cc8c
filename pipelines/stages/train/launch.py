"""The driver's side: start the workers with Ray Train, and after losing one go on from the newest checkpoint.

Ray Train restarts workers by itself, but it cannot tell the user's error from the cluster's and would retry both, and
it takes a node that never comes for a reason to wait forever. So each attempt is one `fit` without retries, and the
decision to go on is made here (docs/design/0020).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from base.errors import DamagedError, UserError
from pipelines.engine.interrupts import kept_handlers
from pipelines.engine.stage import Resources
from pipelines.errors import InfrastructureError
from pipelines.ray_errors import explained_ray, is_lost_process
from pipelines.stages.placement import too_small, wait_for_room, worker_bundle
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.environment import ray_train_settings
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.worker import train_worker
from pipelines.storage.artifact import ArtifactDir

logger = logging.getLogger(__name__)


class TrainingLostError(InfrastructureError):
    """The cluster failed more often than max_failures allows; the checkpoints are there to go on from."""


class _Trainer(TorchTrainer):
    """Ray's trainer without two of its parts."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to us: Ray Train would wait for every worker to end in order, which takes a minute."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out the cleaner of placement groups if there is no dashboard.

        It asks the dashboard whether the controller lives. Without one it gives up after 40 s, and a training that ends
        sooner waits 12 s for it.
        """
        callbacks: list[Any] = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def run_training(job: TrainJob) -> TrainFacts:
    """Train to the end, through lost workers and lost controllers of Ray Train.

    Raises:
        DamagedError: there are checkpoints, and none is whole.
        UserError: the configuration, the data or the course of training is at fault; or no machines are that large.
        InfrastructureError: a disk or the storage failed, or the room for the workers is gone or taken.
        TrainingLostError: workers were lost more than config.max_failures times.
        KeyboardInterrupt: interrupted by SIGINT.
        Exception: a worker's own error, where it came back config.max_failures times: a bug.
    """
    with explained_ray("Training"):
        wait_for_room(job.config.resources, _nodes, can_grow=_has_autoscaler())
    failures = 0
    while True:
        resume_step = resume_point(job.artifact)
        try:
            return _attempt(replace(job, resume_step=resume_step))
        except (UserError, InfrastructureError):
            raise
        except (TrainingFailedError, RayError) as error:
            causes = _causes(error)
            of_ours = next((cause for cause in causes if isinstance(cause, UserError | InfrastructureError)), None)
            if of_ours is not None:  # another attempt would meet the same
                raise of_ours from None
            failures += 1
            if failures > job.config.max_failures:
                bug = next((cause for cause in causes if not is_lost_process(cause)), None)
                if bug is not None:
                    raise bug from error
                raise TrainingLostError(
                    f"Training workers failed {failures} times, more than max_failures={job.config.max_failures}. "
                    f"The last failure: {error}"
                ) from error
            logger.warning(
                "Training lost a worker (%d of at most %d failures) and goes on from its newest checkpoint: %s",
                failures,
                job.config.max_failures,
                _first_line(error),
            )
        _wait_for_lost_room(job.config.resources)


def _causes(error: BaseException) -> list[BaseException]:
    """The errors of the workers or of the controller inside one of Ray Train's; else the error itself."""
    if isinstance(error, WorkerGroupError):
        return [cause for failure in error.worker_failures.values() for cause in _causes(failure)]
    if isinstance(error, ControllerError):
        return _causes(error.controller_failure)
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return _causes(error.cause)
    return [error]


def _wait_for_lost_room(resources: Resources) -> None:
    """As wait_for_room in a run that had its room: a lost machine may come back."""
    with explained_ray("Training"):
        try:
            wait_for_room(resources, _nodes, can_grow=True)
        except UserError as error:
            raise InfrastructureError(
                f"The cluster lost the room that training had, for placement_timeout_s="
                f"{resources.placement_timeout_s:g} s. {error} The same command resumes from the newest checkpoint."
            ) from error


def resume_point(artifact: ArtifactDir) -> int | None:
    """Step of the newest whole checkpoint, None where none was ever completed. Raises DamagedError: none is whole."""
    newest = checkpoints.newest_complete(artifact)
    if newest is not None:
        return newest.state.step
    if checkpoints.any_complete(artifact):
        raise DamagedError(
            f"Every checkpoint in {artifact.url}/{checkpoints.CHECKPOINTS} is damaged; the warnings above name the "
            "files. Restore one, or delete that folder to train from step 0."
        )
    return None


def _attempt(job: TrainJob) -> TrainFacts:
    """One worker group from start to end or failure."""
    resources = job.config.resources
    ray_dir = tempfile.mkdtemp(prefix="bmojo-ray-train-")
    trainer = _Trainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=int(job.config.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
        ),
        run_config=RunConfig(
            name=f"{job.artifact.local.name}",
            storage_path=ray_dir,  # Ray Train keeps its own bookkeeping here; our checkpoints go to the artifact
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with ray_train_settings(resources), kept_handlers():
            result = trainer.fit()
    except ControllerError as error:
        if "StartupTimeout" in type(error.controller_failure).__name__:
            raise InfrastructureError(
                f"Waited placement_timeout_s={resources.placement_timeout_s:g} s for room; other work has the cluster. "
                f"Counting what is free now, {too_small(resources, _free_nodes())} Or wait: the same command resumes."
            ) from error
        raise
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    if result.return_value is None:
        raise KeyboardInterrupt  # aborted from elsewhere: a quiet end without a result
    return TrainFacts.model_validate(result.return_value)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free_nodes() -> list[dict[str, float]]:
    per_node: dict[Any, dict[str, float]] = available_resources_per_node()
    return list(per_node.values())


def _has_autoscaler() -> bool:
    return bool(state.get_max_resources_from_cluster_config())


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
