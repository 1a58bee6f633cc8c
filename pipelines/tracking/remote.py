"""A journal that Ray workers write to through an actor on the driver's machine, without waiting for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from base.errors import UserError
from base.threads import beside
from pipelines.errors import InfrastructureError
from pipelines.tracking.journal import Journal, workers_journal
from pipelines.tracking.request import Request

_FLUSH_TIMEOUT_S = 30.0
_STOP_POLL_S = 0.5
_LOCK_TIMEOUT_S = 60.0  # the actor of a driver that was killed may take a while to follow it

_Point = tuple[int, dict[str, float], int]  # step, values, milliseconds since the epoch

log = logging.getLogger(__name__)


class RemoteJournal:
    """What a worker holds. Picklable; no method of it raises: training does not die of tracking.

    All of it is kept until a flush confirms it, which sends it again; the journal skips what it has.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._unconfirmed: list[_Point] = []
        self._unconfirmed_tags: dict[str, str] = {}
        self._unconfirmed_notices: list[str] = []
        self._question: Any = None  # the pending answer to what is asked
        self._answer = Request.NONE

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """As Journal.log_metrics, at once: the point is on its way when this returns, with the time of the call."""
        point: _Point = (step, {name: float(value) for name, value in values.items()}, _now_ms())
        self._unconfirmed.append(point)
        try:
            self._handle.log_metrics.remote(*point)
        except Exception as error:
            log.warning("Metrics of step %d are kept for later: %s", step, error)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """As Journal.log_tags, at once."""
        self._unconfirmed_tags |= tags
        try:
            self._handle.log_tags.remote(dict(tags))
        except Exception as error:
            log.warning("The tags %s are kept for later: %s", ", ".join(tags), error)

    def log_notice(self, text: str) -> None:
        """As Journal.log_notice, at once."""
        self._unconfirmed_notices.append(text)
        try:
            self._handle.log_notice.remote(text)
        except Exception as error:
            log.warning("A notice is kept for later: %s", error)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """As Journal.log_params, before it returns."""
        try:
            ray.get(self._handle.log_params.remote(dict(params)), timeout=_FLUSH_TIMEOUT_S)
        except Exception as error:
            log.warning("The journal did not take %s: %s", ", ".join(params), error)

    def request(self) -> Request:
        """What the stage's process asks, as the actor last answered. Does not wait."""
        try:
            if self._question is not None and ray.wait([self._question], timeout=0)[0]:
                self._answer = Request(ray.get(self._question))
                self._question = None
            if self._question is None:
                self._question = self._handle.request.remote()
        except Exception as error:
            log.warning("Could not ask whether to stop: %s", error)
            self._question = None
        return self._answer

    def ask(self, request: Request) -> None:
        """Ask the workers: for the stage's process. Before it returns; nobody hears it where the actor is lost."""
        with suppress(Exception):  # a lost actor; the scheduler ends the work in another way
            ray.get(self._handle.ask.remote(request), timeout=_FLUSH_TIMEOUT_S)

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Return once all points, tags and notices of this worker are on the disk, or False if they are not, but kept.

        Call it before a checkpoint is made to count: the steps before a checkpoint are not done again after a crash.
        One thread may flush while another logs.
        """
        points, tags = list(self._unconfirmed), dict(self._unconfirmed_tags)
        notices = list(self._unconfirmed_notices)
        try:
            ray.get(self._handle.flush.remote(points, tags, notices), timeout=timeout_s)
        except Exception as error:
            log.warning("The journal did not confirm its points, which are kept: %s", error)
            return False
        del self._unconfirmed[: len(points)]
        del self._unconfirmed_notices[: len(notices)]
        for name, text in tags.items():
            if self._unconfirmed_tags.get(name) == text:
                del self._unconfirmed_tags[name]
        return True


class _JournalActorBody:
    """The actor: a Journal of its own in the file system of the stage's process."""

    def __init__(self, path: str) -> None:
        self._journal = Journal(path, lock_timeout_s=_LOCK_TIMEOUT_S)
        self._request = Request.NONE

    def log_metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        try:
            self._journal.log_metrics(step, values, time_ms)
        except (InfrastructureError, UserError) as error:  # nobody waits for this call; the flush brings the point
            log.warning("Metrics of step %d are not journalled yet: %s", step, error)

    def log_tags(self, tags: dict[str, str]) -> None:
        try:
            self._journal.log_tags(tags)
        except (InfrastructureError, UserError) as error:
            log.warning("The tags %s are not journalled yet: %s", ", ".join(tags), error)

    def log_notice(self, text: str) -> None:
        try:
            self._journal.log_notice(text)
        except (InfrastructureError, UserError) as error:
            log.warning("A notice is not journalled yet: %s", error)

    def log_params(self, params: dict[str, Any]) -> None:
        self._journal.log_params(params)

    def flush(self, points: list[_Point], tags: dict[str, str], notices: list[str]) -> None:
        for step, values, time_ms in points:
            self._journal.log_metrics(step, values, time_ms)
        self._journal.log_tags(tags)
        for text in notices:
            self._journal.log_notice(text)
        self._journal.flush()

    def ask(self, request: Request) -> None:
        if self._request is not Request.STOP:
            self._request = request

    def request(self) -> Request:
        return self._request

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._journal.close()


def log_missing(path: Path, history: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Bring a stage's workers' journal up to what the finished work reports of itself.

    Normally it has all of it. Points were lost if the last flush failed, as in a long restart of the actor.
    """
    try:
        with Journal(path, lock_timeout_s=_LOCK_TIMEOUT_S) as journal:
            for name, points in history.items():
                for step, value in points:
                    journal.log_metrics(step, {name: value})
    except (InfrastructureError, UserError) as error:
        log.warning("%s may lack points of the curves: %s", path, error)


@contextmanager
def remote_journal(journal: Journal, stop: threading.Event | None = None) -> Iterator[RemoteJournal]:
    """A journal for the workers of the stage that holds `journal`; it is a second file of the same stage.

    Use it in the stage's process, with Ray initialised, around the work. The workers can ask it whether `stop` is set.
    """
    path = workers_journal(journal.path)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class: Any = ray.remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,  # a call that met a restart is done again; the journal skips what it has
        scheduling_strategy=here,
    )(_JournalActorBody)
    handle = actor_class.remote(str(path))
    workers_end = RemoteJournal(handle)

    def pass_on(is_over: threading.Event) -> None:
        while stop is not None and not is_over.is_set():
            if stop.wait(_STOP_POLL_S):
                workers_end.ask(Request.STOP)
                return

    try:
        with beside(pass_on, "pass on stop", end_s=0):
            yield workers_end
    finally:
        try:
            ray.get(handle.close.remote(), timeout=_FLUSH_TIMEOUT_S)
        except Exception as error:
            log.warning("The workers' journal %s was not closed in order: %s", path, error)
        ray.kill(handle)


def _now_ms() -> int:
    return int(time.time() * 1000)
