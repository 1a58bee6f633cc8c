"""How far a run is: its events (events.py), folded in order."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ConfigDict, Field

from base.config import StrictConfig
from pipelines.engine.event_log import Entry
from pipelines.engine.events import (
    AttemptLost,
    Ended,
    Event,
    Failed,
    Finished,
    Gated,
    Noted,
    Planned,
    Progress,
    Queued,
    RunInfo,
    Started,
    Status,
)

EXIT_CODES = {
    Status.SUCCEEDED: 0, Status.FAILED: 1, Status.RESUMABLE: 75, Status.CANCELLED: 130, Status.STOPPED: 3,
}  # fmt: skip
"""Of a run that ended so, where its log does not say (a bug has one of its own)."""
UNFINISHED = (Status.PENDING, Status.QUEUED, Status.RUNNING)
_KEPT = ("artifact", "started_at", "attempts", "log", "done", "total")  # of an unfinished stage, by the next owner


class StageState(StrictConfig):
    """How far one stage of a run is. Times are ISO 8601 in UTC."""

    model_config = ConfigDict(allow_inf_nan=True)

    kind: str
    status: Status = Status.PENDING
    fingerprint: str
    artifact: str | None = None  # path in the run's storage, once there is one
    reused: bool = False  # another run made it
    started_at: str | None = None  # of the last attempt that did any of its work
    finished_at: str | None = None
    error: str | None = None  # of the last attempt
    reason: str | None = None  # what a queued stage waits for
    note: str | None = None  # the last notice of the attempt under way
    gate: str | None = None  # why nothing may go on from its result
    attempts: int = 0  # of all owners
    log: str | None = None  # of the last attempt, in the run's directory
    pid: int | None = None
    host: str | None = None
    done: int | None = None  # steps
    total: int | None = None
    values: dict[str, float] = Field(default_factory=dict)
    progress_at: str | None = None


class RunState(StrictConfig):
    """How far a run is. A drive that only checks a finished run leaves the times as they were."""

    info: RunInfo
    status: Status = Status.PENDING
    started_at: str | None = None
    finished_at: str | None = None
    checked_at: str | None = None  # when a later drive last found all of it finished
    error: str | None = None
    exit_code: int | None = None  # of the command that drove it to its end
    owners: int = 0  # drives so far
    stages: dict[str, StageState]
    has_worked: bool = False  # the last owner started a stage

    def with_stage(self, name: str, **changes: object) -> RunState:
        """A copy in which one stage has changed."""
        stage = self.stages[name].model_copy(update=changes)
        return self.model_copy(update={"stages": {**self.stages, name: stage}})


def fold(entries: Iterable[Entry]) -> RunState | None:
    """The state after these events, which begin with the first of the run; None where there are none."""
    state: RunState | None = None
    for _, event in entries:
        state = after(state, event)
    return state


def after(state: RunState | None, event: Event) -> RunState | None:
    """The state once `event` has happened. Events of stages that the run does not have change nothing."""
    if isinstance(event, Planned):
        return _begun(state, event)
    if state is None:
        return None  # sealed before it began
    if isinstance(event, Ended):
        return _ended(state, event)
    stage = state.stages.get(getattr(event, "stage", ""))
    if stage is None:
        return state
    match event:
        case Queued():
            return state.with_stage(event.stage, status=Status.QUEUED, reason=event.reason)
        case Started():
            state = state.with_stage(
                event.stage,
                status=Status.RUNNING,
                artifact=event.artifact,
                started_at=event.at,
                finished_at=None,
                error=None,
                reason=None,
                note=None,
                attempts=stage.attempts + 1,
                log=event.log,
                pid=event.pid,
                host=event.host,
            )
            return state.model_copy(update={"has_worked": True, "finished_at": None})
        case Progress():
            return state.with_stage(
                event.stage, done=event.done, total=event.total, values=event.values, progress_at=event.at
            )
        case Noted():
            return state.with_stage(event.stage, note=event.text)
        case AttemptLost():
            return state.with_stage(event.stage, status=Status.QUEUED, error=event.error, reason=_pause(event))
        case Finished():
            return _stage_finished(state, stage, event)
        case Gated():
            return state.with_stage(event.stage, gate=event.reason)
        case Failed():
            return state.with_stage(
                event.stage, status=event.status, error=event.error, finished_at=event.at, reason=None
            )
    return state


def _pause(event: AttemptLost) -> str:
    return f"attempt {event.attempt} was lost; the next one starts in {event.pause_s:.0f} s"


def _begun(before: RunState | None, event: Planned) -> RunState:
    stages = {}
    for name, fingerprint in event.info.fingerprints.items():
        old = before.stages.get(name) if before is not None else None
        if old is not None and old.status is Status.SUCCEEDED and name in event.reused:
            stages[name] = old
        else:
            stages[name] = StageState(
                kind=event.info.kinds.get(name, ""),
                fingerprint=fingerprint,
                **({name: getattr(old, name) for name in _KEPT} if old else {}),
            )
    info = event.info
    if before is not None:
        info = info.model_copy(update={"created_at": before.info.created_at})
        if info.overrides is None:  # a resume does not know them
            info = info.model_copy(update={"overrides": before.info.overrides})
    return RunState(
        info=info,
        status=Status.RUNNING,
        started_at=(before.started_at if before else None) or event.at,
        finished_at=before.finished_at if before and before.status is Status.SUCCEEDED else None,
        checked_at=before.checked_at if before else None,
        owners=(before.owners if before else 0) + 1,
        stages=stages,
    )


def _stage_finished(state: RunState, stage: StageState, event: Finished) -> RunState:
    if stage.status is Status.SUCCEEDED and stage.artifact == event.artifact:
        return state  # found again: when it was made stays told
    changes: dict[str, object] = {"status": Status.SUCCEEDED, "error": None, "reason": None, "note": None}
    if event.recorded_at is None:
        changes["finished_at"] = event.at
    elif stage.artifact == event.artifact and stage.started_at:
        changes["finished_at"] = event.recorded_at  # this run made it, and its driver died before it said so
    else:
        changes |= {"reused": True, "started_at": None, "finished_at": None}
    return state.with_stage(event.stage, artifact=event.artifact, **changes)


def _ended(state: RunState, event: Ended) -> RunState:
    left = Status.CANCELLED if event.status is Status.CANCELLED else Status.RESUMABLE
    for name, stage in state.stages.items():
        if stage.status in (Status.QUEUED, Status.RUNNING):  # nobody works on it any more
            state = state.with_stage(name, status=left, reason=None)
    code = EXIT_CODES[event.status] if event.exit_code is None else event.exit_code
    changes: dict[str, object] = {
        "status": event.status,
        "finished_at": event.at,
        "error": event.error,
        "exit_code": code,
    }
    if event.status is Status.SUCCEEDED and not state.has_worked:
        if state.finished_at is not None:  # it had succeeded before: only checked
            changes |= {"finished_at": state.finished_at, "checked_at": event.at}
        else:  # the owner before died, or was stopped, after its last stage
            ends = [stage.finished_at for stage in state.stages.values() if stage.finished_at]
            changes["finished_at"] = max(ends, default=event.at)
    return state.model_copy(update=changes)
