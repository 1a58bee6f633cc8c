"""A journal that Ray workers write to through an actor on the driver's machine, without waiting for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines.tracking.journal import Journal

WORKERS_SUFFIX = ".workers.jsonl"
_FLUSH_TIMEOUT_S = 30.0
_LOCK_TIMEOUT_S = 60.0  # the actor of a driver that was killed may take a while to follow it

log = logging.getLogger(__name__)


class RemoteJournal:
    """What a worker holds. Picklable; no method of it raises: training does not die of tracking."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """As Journal.log_metrics, at once: the point is on its way when this returns, with the time of the call."""
        try:
            self._handle.log_metrics.remote(step, {name: float(value) for name, value in values.items()}, _now_ms())
        except Exception as error:
            log.warning("Metrics of step %d are lost: %s", step, error)

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> None:
        """Return once all points of this worker are on the disk. Call it before a checkpoint is made to count: the
        steps before a checkpoint are not done again after a crash, so neither are their points."""
        import ray

        try:
            ray.get(self._handle.flush.remote(), timeout=timeout_s)
        except Exception as error:
            log.warning("The journal did not confirm its points: %s", error)


class _JournalActorBody:
    """The actor: a Journal of its own in the driver's file system."""

    def __init__(self, path: str) -> None:
        self._journal = Journal(path, lock_timeout_s=_LOCK_TIMEOUT_S)

    def log_metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        self._journal.log_metrics(step, values, time_ms)

    def flush(self) -> None:
        self._journal.flush()

    def close(self) -> None:
        self._journal.close()


@contextmanager
def remote_journal(journal: Journal) -> Iterator[RemoteJournal]:
    """A journal for the workers of the stage that holds `journal`; it is a second file of the same stage.

    Use it on the driver, with Ray initialised, around the work: `with remote_journal(context.journal) as journal: ...`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = journal.path.with_name(journal.path.stem + WORKERS_SUFFIX)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_JournalActorBody)
    handle = actor_class.remote(str(path))
    try:
        yield RemoteJournal(handle)
    finally:
        try:
            ray.get(handle.close.remote(), timeout=_FLUSH_TIMEOUT_S)
        except Exception as error:
            log.warning("The workers' journal %s was not closed in order: %s", path, error)
        ray.kill(handle)


def _now_ms() -> int:
    return int(time.time() * 1000)
