"""How far a run is, stage by stage; once, or again and again until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from shlex import quote
from typing import Any

from base.errors import UserError
from pipelines.api.finding import needs_of
from pipelines.engine.events import Status, utc_now
from pipelines.engine.history import History, Sample
from pipelines.engine.lease import Watch
from pipelines.engine.records import FinishedStage, read_record
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.engine.state import UNFINISHED, RunState, StageState
from pipelines.errors import InfrastructureError
from pipelines.stages import STAGES
from pipelines.tracking.links import tracking_links
from pipelines.tracking.run_tracking import live_relpath

WATCH_EVERY_S = 2.0
_LOOK_AGAIN_S = 15.0  # for tracking links and the like, which change once at most


class StageStatus(Facts):
    """How far one stage is. Times are ISO 8601 in UTC."""

    name: str
    kind: str
    status: Status
    reused: bool  # another run made its result
    attempt: int  # number of the last one, over all drivers of the run; 0: none yet
    done: int | None  # steps
    total: int | None
    values: dict[str, float]  # the newest of the metrics that show progress
    progress_at: str | None  # when these were taken
    eta_s: float | None  # seconds until it is done, at the speed of the attempt so far
    waits_for: str | None  # of a stage that has not started, or starts again
    error: str | None  # of the last attempt
    note: str | None  # the last notice of the attempt under way
    gate: str | None  # why nothing may go on from its result
    log: str | None  # path or URL of the last attempt's output
    artifact: str | None  # path or URL of its folder
    started_at: str | None
    finished_at: str | None
    time_s: float | None  # between the two, or so far
    pid: int | None  # of the last attempt
    host: str | None
    summary: str | None  # of the result, in a line

    def shown_values(self) -> list[str]:
        """The values in words, as their kind of stage writes them."""
        kind = next((known for known in STAGES if known.kind == self.kind), None)
        shown: Mapping[str, str] = kind.progress.shown if kind is not None and kind.progress is not None else {}
        return [
            shown[name].format(value) if name in shown else f"{name} {value:.6g}" for name, value in self.values.items()
        ]


class RunStatus(Facts):
    """How far a run is. Times are ISO 8601 in UTC."""

    run: str
    name: str  # of the pipeline
    status: Status
    url: str  # of the run's directory
    driver: str | None  # who drives it now
    started_at: str | None
    finished_at: str | None
    checked_at: str | None  # when a later drive last found all of it finished
    time_s: float | None
    error: str | None
    exit_code: int | None  # of the command that drove it; None while it runs
    links: dict[str, str]  # by tracker: the page that shows the run, or the command that does
    resume: str | None  # the command that resumes it, if that would help
    stages: tuple[StageStatus, ...]

    def stage(self, name: str) -> StageStatus:
        """One stage. Raises KeyError."""
        found = {stage.name: stage for stage in self.stages}
        return found[name]

    def without_clocks(self) -> RunStatus:
        """The same without what changes by time alone, to see whether anything happened."""
        stages = tuple(stage.model_copy(update={"eta_s": None, "time_s": None}) for stage in self.stages)
        driver = self.driver and self.driver.partition(", last seen")[0]
        return self.model_copy(update={"time_s": None, "driver": driver, "stages": stages})


class StatusReader:
    """Looks at one run again and again, and reads only what is new."""

    def __init__(self, run: Run, on_watch: Watch | None = None) -> None:
        """Args: on_watch: see Run.state. Raises: UserError: the run has no readable history."""
        self._history, self._run, self._on_watch = History(run), run, on_watch
        self._summaries: dict[str, str | None] = {}
        self._links: dict[str, str] = {}
        self._links_at = float("-inf")

    def read(self) -> RunStatus:
        """How far it is now."""
        run = self._run
        state = self._history.state(self._on_watch)
        holder = run.holder(self._on_watch) if state.status is Status.RUNNING else None
        state = self._with_live(state)
        is_resumable = state.status in (Status.RESUMABLE, Status.CANCELLED)
        return RunStatus(
            run=run.run_id,
            name=state.info.name,
            status=state.status,
            url=run.url,
            driver=f"{holder}, {holder.last_seen}" if holder is not None else None,
            started_at=state.started_at,
            finished_at=state.finished_at,
            checked_at=state.checked_at,
            time_s=elapsed_s(state),
            error=state.error,
            exit_code=None if state.status is Status.RUNNING else state.exit_code,
            links=self._tracking(state),
            resume=f"bmojo resume {run.run_id} --storage {quote(run.storage.url)}" if is_resumable else None,
            stages=tuple(self._stage(name, stage, state) for name, stage in state.stages.items()),
        )

    def _stage(self, name: str, stage: StageState, state: RunState) -> StageStatus:
        is_running = stage.status is Status.RUNNING
        return StageStatus(
            name=name,
            kind=stage.kind,
            status=stage.status,
            reused=stage.reused,
            attempt=len(self._history.attempts.get(name, ())),
            done=stage.done,
            total=stage.total,
            values=stage.values,
            progress_at=stage.progress_at,
            eta_s=self._eta_s(name, stage) if is_running else None,
            waits_for=waits_for(name, state),
            error=stage.error,
            note=stage.note,
            gate=stage.gate,
            log=self._run.storage.url_of(f"{self._run.relpath}/{stage.log}") if stage.log else None,
            artifact=self._run.storage.url_of(stage.artifact) if stage.artifact else None,
            started_at=stage.started_at,
            finished_at=stage.finished_at,
            time_s=elapsed_s(stage),
            pid=stage.pid,
            host=stage.host,
            summary=self._summary(stage),
        )

    def _with_live(self, state: RunState) -> RunState:
        """With the picture that the driver overwrites every few seconds: the log has samples now and then only."""
        if state.status is not Status.RUNNING:
            return state
        try:
            live: dict[str, Any] = self._run.storage.read_json(live_relpath(self._run.relpath, self._history.owner))
        except (FileNotFoundError, UserError, InfrastructureError):
            return state
        for name, sample in live["stages"].items():
            stage = state.stages.get(name)
            if stage is None or stage.status is not Status.RUNNING:
                continue
            if live["at"] >= max(stage.started_at or "", stage.progress_at or ""):
                state = state.with_stage(name, **sample, progress_at=live["at"])
        return state

    def _eta_s(self, name: str, stage: StageState) -> float | None:
        if not stage.total or stage.done is None or stage.progress_at is None:
            return None
        first = self._history.first_samples.get(name)
        if first is None or first.done >= stage.done:
            attempt = self._history.attempts[name][-1]
            first = None if attempt.resumed else Sample(attempt.started_at, 0)
        if first is None or first.done >= stage.done:
            return None
        took_s = _between_s(first.at, stage.progress_at)
        left_s = took_s * (stage.total - stage.done) / (stage.done - first.done)
        return round(max(0.0, left_s - max(0.0, _between_s(stage.progress_at, utc_now()))), 1)

    def _summary(self, stage: StageState) -> str | None:
        """Of a finished stage. The next run reports a damaged record, not this view."""
        if stage.status is not Status.SUCCEEDED or stage.artifact is None:
            return None
        if stage.artifact not in self._summaries:
            self._summaries[stage.artifact] = _summary(self._run, stage)
        return self._summaries[stage.artifact]

    def _tracking(self, state: RunState) -> dict[str, str]:
        if time.monotonic() > self._links_at + _LOOK_AGAIN_S:
            self._links = tracking_links(self._run.storage, self._run.relpath, state.info.config)
            self._links_at = time.monotonic()
        return self._links


def status(run: Run, on_watch: Watch | None = None) -> RunStatus:
    """How far a run is now. Raises UserError: it has no readable history."""
    return StatusReader(run, on_watch).read()


def watch(run: Run, on_watch: Watch | None = None, every_s: float = WATCH_EVERY_S) -> Iterator[RunStatus]:
    """How far a run is, every `every_s` seconds; the last one when it has ended, or its driver is gone. Raises as
    status."""
    reader = StatusReader(run, on_watch)
    while True:
        current = reader.read()
        yield current
        if current.status is not Status.RUNNING:
            return
        time.sleep(every_s)


def waits_for(name: str, state: RunState) -> str | None:
    """What a stage waits for, if it waits."""
    stage = state.stages[name]
    if stage.status is Status.QUEUED:
        return stage.reason
    if stage.status not in UNFINISHED or stage.status is Status.RUNNING or state.status is not Status.RUNNING:
        return None
    missing = missing_inputs(name, state)
    return f"needs {', '.join(f'{need} ({was})' for need, was in missing.items())}" if missing else None


def missing_inputs(name: str, state: RunState) -> dict[str, Status]:
    """The stages that a stage reads and that are not finished, with their status."""
    needs = {need: state.stages[need].status for need in needs_of(state.info, name) if need in state.stages}
    return {need: status for need, status in needs.items() if status is not Status.SUCCEEDED}


def elapsed_s(state: RunState | StageState) -> float | None:
    """How long it took; of what runs, how long it has been running."""
    end = state.finished_at or (utc_now() if state.status is Status.RUNNING else None)
    return round(max(0.0, _between_s(state.started_at, end)), 3) if state.started_at and end else None


def _between_s(first: str, second: str) -> float:
    return (_parsed(second) - _parsed(first)).total_seconds()


def _parsed(time_text: str) -> datetime:
    parsed = datetime.fromisoformat(time_text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _summary(run: Run, stage: StageState) -> str | None:
    kind = next((known for known in STAGES if known.kind == stage.kind), None)
    artifact = run.artifact_of(stage)
    if kind is None or artifact is None:
        return None
    try:
        record = read_record(artifact)
        summary: str | None = None if record is None else FinishedStage(artifact, record).result(kind).output.summary()
    except UserError:
        return None
    return summary
