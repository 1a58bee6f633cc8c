"""One stage while its run is driven: its attempts, its retries, how far it is, and when it must end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

from pipelines.engine.events import Status
from pipelines.engine.failures import EXIT_RESUMABLE, Failure
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.policy import Tally
from pipelines.engine.processes import Attempt
from pipelines.engine.stage import tells_progress
from pipelines.tracking.journal import workers_journal
from pipelines.tracking.run_tracking import JournalWatch

_FIRST_SAMPLE_S = 5.0
_SAMPLE_SHARE = 0.02  # of the attempt's time so far: samples grow rarer, so that long runs keep few
_TIMEOUT_GRACE_S = 120.0  # for training to write a checkpoint
_STOPPED_AGAIN_S = 10.0  # between the second request and SIGKILL


class Sample(TypedDict):
    """How far a stage is; the fields of an event Progress."""

    done: int
    total: int | None
    values: dict[str, float]


class StageRun:
    """Bookkeeping of the scheduler for one stage."""

    def __init__(self, planned: PlannedStage) -> None:
        self.planned = planned
        self.name = planned.name
        self.tally = Tally(mark=0)
        self.attempt = 0
        self.is_settled = False  # finished, or failed for good
        self.may_be_finished = planned.action is Action.REUSE
        self.not_before = 0.0  # monotonic time of the next look at it
        self.queued_for: str | None = None
        self.stopped_for: Failure | None = None  # what its end counts as, once it was asked to stop
        self._process: Attempt | None = None
        self._watch: JournalWatch | None = None
        self._began_at = 0.0
        self._stop_at: list[float] = []  # monotonic times of: the second request to stop, SIGKILL
        self._done = 0
        self._latest: dict[str, float] = {}
        self._sampled_at = 0.0

    @property
    def is_running(self) -> bool:
        """Whether an attempt is under way."""
        return self._process is not None

    def begin(
        self,
        process: Attempt,
        journal: Path,
        on_metrics: Callable[[int, Mapping[str, float]], None],
        on_notice: Callable[[str], None],
    ) -> None:
        """An attempt has started, and writes `journal`. The callbacks are called from a thread."""

        def take(step: int, values: Mapping[str, float]) -> None:
            if tells_progress(values):
                self._done = max(self._done, step)
                self._latest.update(values)
            on_metrics(step, values)

        self._process, self._began_at = process, time.monotonic()
        self._sampled_at = self._began_at
        self.queued_for, self.stopped_for, self._stop_at = None, None, []
        self._watch = JournalWatch([journal, workers_journal(journal)], take, on_notice)
        self._watch.__enter__()

    def end(self) -> None:
        """The attempt has ended; all that it journalled is taken in."""
        self._process = None
        if self._watch is not None:
            self._watch.__exit__()
            self._watch = None

    def stop_for(self, reason: Failure, grace_s: float) -> None:
        """Ask the attempt to end, for this reason; it is killed if it does not within `grace_s`."""
        if self._process is None:
            return
        if self.stopped_for is None:
            self.stopped_for = reason
            self._process.stop()
        now = time.monotonic()
        stop_at = [now + grace_s, now + grace_s + _STOPPED_AGAIN_S]
        self._stop_at = [min(pair) for pair in zip(stop_at, self._stop_at, strict=True)] if self._stop_at else stop_at

    def kill_for(self, reason: Failure) -> None:
        """End the attempt at once, for this reason."""
        if self._process is not None and self.stopped_for is None:
            self.stopped_for = reason
            self._process.kill()

    def kill(self) -> None:
        """End the attempt at once, if there is one, and hear no more of it."""
        if self._process is not None:
            self._process.kill()
            self.end()

    def stop_if_late(self) -> None:
        """Stop an attempt that takes longer than `timeout_s`; end one that was stopped and does not end."""
        if self._process is None:
            return
        now, timeout_s = time.monotonic(), self.planned.config.timeout_s
        if timeout_s is not None and self.stopped_for is None and now > self._began_at + timeout_s:
            text = f"took longer than its timeout_s={timeout_s:g} and was stopped; the same command resumes"
            reason = Failure(Status.RESUMABLE, text, None, EXIT_RESUMABLE, may_pass=True)
            self.stop_for(reason, _TIMEOUT_GRACE_S)
        if len(self._stop_at) == 2 and now > self._stop_at[0]:
            self._process.stop()
            self._stop_at = self._stop_at[1:]
        elif self._stop_at and now > self._stop_at[-1]:
            self._process.kill()
            self._stop_at = []

    def sample(self) -> Sample | None:
        """How far it is, or was at its end; None if it does not say."""
        shown = self.planned.node.stage.progress
        if shown is None or not self._latest:
            return None
        latest = dict(self._latest)
        total = latest.get(shown.total)
        values = {name: latest[name] for name in shown.shown if name in latest}
        return Sample(done=self._done, total=None if total is None else int(total), values=values)

    def sample_is_due(self) -> bool:
        """Whether the log should have a sample now; True once per interval."""
        now = time.monotonic()
        if now - self._sampled_at < max(_FIRST_SAMPLE_S, _SAMPLE_SHARE * (now - self._began_at)):
            return False
        self._sampled_at = now
        return True
