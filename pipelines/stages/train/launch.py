"""One attempt at training: start the workers with Ray Train, and say what their end means.

Ray Train restarts workers by itself, but it cannot tell the user's error from the cluster's and would retry both, and
it takes a node that never comes for a reason to wait forever. So each attempt is one `fit` without retries; the
scheduler decides whether another one follows, which resumes from the newest checkpoint (docs/design/0020). How many
workers there are is chosen for each `fit` (docs/design/0025).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from base.errors import DamagedError, UserError
from pipelines.engine.interrupts import kept_handlers
from pipelines.engine.placement import Demand, described, too_small
from pipelines.errors import InfrastructureError, LostError
from pipelines.ray_errors import explained_ray, is_lost_process
from pipelines.stages.ray_resources import alive_nodes, can_grow, free_nodes, wait_for_machines
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.agreement import LeftToGrow
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.environment import ray_train_settings
from pipelines.stages.train.group import choose_size, growing
from pipelines.stages.train.guards.watchdog import Watch, watched
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.layout import CHECKPOINTS
from pipelines.stages.train.ray_folder import new_ray_train_folder
from pipelines.stages.train.worker import train_worker
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal
from pipelines.tracking.request import Request

logger = logging.getLogger(__name__)


class _Trainer(TorchTrainer):
    """Ray's trainer without two of its parts."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to us: Ray Train would wait for every worker to end in order, which takes a minute."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out the cleaner of placement groups.

        Ours go with the process of the attempt, whose job they belong to. In Ray 2.60 the cleaner of a controller that
        was killed never ends; and without a dashboard, which it asks, a short training waits 12 s for it.
        """
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def run_training(job: TrainJob, attempt: int = 1, journal: Journal | None = None) -> TrainFacts:
    """Train to the end, from the newest checkpoint if there is one, on as many workers as there is room for.

    A group that leaves because there is room for a larger one is followed by that one, in the same attempt.

    Args: attempt: from 1, in this run. journal: hears of reports on a hang.
    Raises:
        DamagedError: there are checkpoints, and none is whole.
        UserError: the configuration, the data or the course of training is at fault; or no machines are that large.
        InfrastructureError: a disk or the storage failed, or the room for the workers is taken.
        LostError: a worker, the controller, a machine or the room for the workers is gone.
        Exception: a worker's own error: a bug, or a fault of its machine.
    """
    had_room, left, grow_after_s = attempt > 1, 0, job.config.grow_after_s
    while True:
        _wait_for_room(job.config, had_room)
        size = _choose_size(job.config)
        # Whoever left for room that another job took leaves less readily again.
        grow_after_s = job.config.grow_after_s if size > left else max(1.0, 2 * grow_after_s)
        newest = newest_checkpoint(job.artifact)
        _tell_size(job.config, size, newest)
        try:
            return _run_group(job, size, newest, grow_after_s, journal)
        except LeftToGrow:
            job.metrics.ask(Request.NONE)  # it is done
            had_room, left = True, size


def _run_group(
    job: TrainJob, size: int, newest: checkpoints.Checkpoint | None, grow_after_s: float, journal: Journal | None
) -> TrainFacts:
    """One group of workers from start to end. Raises as run_training."""
    config = job.config
    group_job = replace(
        job, config=config.with_workers(size), resume_step=newest.state.step if newest is not None else None
    )
    watch = Watch(size, config.hang_limit_s, job.artifact, logger.info if journal is None else journal.log_artifact)
    try:
        with (
            watched(watch) as board,
            growing(
                config.group_sizes,
                size,
                config.resources,
                grow_after_s,
                num_begun=board.num_joined,
                ask=lambda: job.metrics.ask(Request.GROW),
            ),
        ):
            return _fit(replace(group_job, board=board))
    except (UserError, InfrastructureError):
        raise
    except (TrainingFailedError, RayError) as error:
        causes = _causes(error)
        of_ours = next((cause for cause in causes if isinstance(cause, UserError | InfrastructureError)), None)
        if of_ours is not None:
            raise of_ours from None
        own = next((cause for cause in causes if not is_lost_process(cause)), None)
        if own is not None:
            raise own from error
        raise LostError(f"Training lost a worker: {_first_line(error)}") from error


def _choose_size(config: TrainStageConfig) -> int:
    with explained_ray("Training"):
        return choose_size(config.group_sizes, config.resources, free_nodes, alive_nodes, can_grow())


def _tell_size(config: TrainStageConfig, size: int, newest: checkpoints.Checkpoint | None) -> None:
    before = newest.state.num_workers if newest is not None else config.resources.num_workers
    if size == before:
        return
    start = "trains" if newest is None else f"goes on from step {newest.state.step}"
    was = f" instead of {before}" if newest is not None else f" of {config.resources.num_workers}"
    if config.resources.min_workers is None:
        why = "resources.num_workers says so"
    elif size > before:
        why = "there is room for more"
    else:
        why = f"the cluster has room for no more ({described(alive_nodes())})"
    logger.warning("%s on %d workers%s: %s", start, size, was, why)


def _causes(error: BaseException) -> list[BaseException]:
    """The errors of the workers or of the controller inside one of Ray Train's; else the error itself."""
    if isinstance(error, WorkerGroupError):
        return [cause for failure in error.worker_failures.values() for cause in _causes(failure)]
    if isinstance(error, ControllerError):
        return _causes(error.controller_failure)
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return _causes(error.cause)
    return [error]


def _wait_for_room(config: TrainStageConfig, had_room: bool) -> None:
    """Wait until the cluster could hold the fewest workers; where it did before, a lost machine may come back."""
    resources = config.resources
    with explained_ray("Training"):
        try:
            wait_for_machines(Demand(resources, config.group_sizes[0]), may_come_back=had_room)
        except UserError as error:
            if not had_room:
                raise
            raise LostError(
                f"The cluster lost the room that training had, for placement_timeout_s="
                f"{resources.placement_timeout_s:g} s. {error} The same command resumes from the newest checkpoint."
            ) from error


def newest_checkpoint(artifact: ArtifactDir) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint, None where none was ever completed. Raises DamagedError: none is whole."""
    newest = checkpoints.newest_complete(artifact)
    if newest is not None:
        return newest
    if checkpoints.any_complete(artifact):
        raise DamagedError(
            f"Every checkpoint in {artifact.url}/{CHECKPOINTS} is damaged; the warnings above name the "
            "files. Restore one, or delete that folder to train from step 0."
        )
    return None


def _fit(job: TrainJob) -> TrainFacts:
    """One worker group from start to end or failure."""
    return TrainFacts.model_validate(run_workers(train_worker, {"job": job}, job.config, job.artifact.local.name))


def run_workers(
    worker: Callable[[dict[str, Any]], dict[str, Any] | None],
    loop_config: dict[str, Any],
    config: TrainStageConfig,
    name: str,
) -> dict[str, Any]:
    """Call a function on each worker of a group. Returns what rank 0's returns.

    Raises: InfrastructureError: other work has the room. LostError: aborted from outside. What Ray Train raises.
    """
    resources = config.resources
    ray_dir = new_ray_train_folder()
    trainer = _Trainer(
        worker,
        train_loop_config=loop_config,
        torch_config=config.backend.ray_train(config.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.bundle(),
            label_selector=dict(resources.node_labels) or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=ray_dir,  # Ray Train keeps its own bookkeeping here; our checkpoints go to the artifact
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env=config.backend.worker_runtime_env() or None,
        ),
    )
    try:
        with ray_train_settings(resources), kept_handlers():
            result = trainer.fit()
    except ControllerError as error:
        if "StartupTimeout" in type(error.controller_failure).__name__:
            all_workers = Demand(resources, resources.num_workers)
            raise InfrastructureError(
                f"Waited placement_timeout_s={resources.placement_timeout_s:g} s for room; other work has the cluster. "
                f"Counting what is free now, {too_small(all_workers, free_nodes())} Or wait: the same "
                "command resumes."
            ) from error
        raise
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    if result.return_value is None:
        raise LostError("Training was aborted from outside, without a result.")
    return_value: dict[str, Any] = result.return_value
    return return_value


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
