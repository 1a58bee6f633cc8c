"""Work of a stage spread over Ray tasks, and what their errors mean to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from base.errors import UserError
from data.errors import SourceUnavailableError
from pipelines.engine.placement import Demand
from pipelines.engine.stage import Content, Resources, StageContext
from pipelines.errors import InfrastructureError
from pipelines.faults import explained_disk
from pipelines.ray_errors import explained_ray
from pipelines.stages.ray_resources import task_options, wait_for_machines

Result = TypeVar("Result")

MAX_RETRIES = 3  # of a task whose worker process or machine died
_CANCEL_S = 5.0


@contextmanager
def user_errors(path: Path | None = None) -> Iterator[None]:
    """Bad data, and a disk that cannot be written or read, become errors of ours.

    Args: path: what is being written, for errors that do not name their file.
    """
    try:
        with explained_disk(path):
            yield
    except SourceUnavailableError as error:
        raise InfrastructureError(str(error)) from error


def require_planned_content(context: StageContext, found: Content) -> None:
    """Raises: UserError: the raw input is not the one that the stage's fingerprint was computed with."""
    if context.content not in (None, found):
        raise UserError(
            f"stages.{context.name}: the files it reads have changed since the run was planned. Nothing was recorded. "
            "Leave them alone while a run reads them, and run again."
        )


def run_tasks(
    function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], resources: Resources
) -> Iterator[Result]:
    """Call `function` with each tuple of arguments in Ray tasks, at most resources.num_workers at once.

    Yields: results as they come. A task whose worker dies is started again; when one raises, the others are cancelled.
    Raises:
        UserError: the data or a right to the disk is at fault, or no machine is large enough for one task.
        InfrastructureError: the cluster, a disk or the network is.
    """
    import ray

    with explained_ray("Looking for room in the cluster"):
        wait_for_machines(Demand(resources, fewest=1))
    task = ray.remote(max_retries=MAX_RETRIES, **task_options(resources))(function)
    waiting = list(reversed(calls))
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < resources.num_workers:
                running.append(task.remote(*waiting.pop()))
            with user_errors(), explained_ray(f"Task {function.__name__.strip('_')}"):
                (done, *_), _ = ray.wait(running, num_returns=1)
                running.remove(done)
                result: Result = ray.get(done)
            yield result
    finally:
        with suppress(Exception):  # a lost cluster has nothing to cancel
            for reference in running:
                ray.cancel(reference, force=True)
            if running:
                ray.wait(running, num_returns=len(running), timeout=_CANCEL_S)
