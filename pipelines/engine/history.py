"""The history of a run, read as it grows: its state, and what the state forgets (attempts, reasons, speed)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.engine.event_log import Entry, Position, positions, read_events, read_history
from pipelines.engine.events import AttemptLost, Failed, Finished, Planned, Progress, Queued, Started, Status
from pipelines.engine.lease import Watch
from pipelines.engine.runs import Run
from pipelines.engine.state import RunState, after


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt at a stage."""

    number: int  # from 1, over all owners of the run
    owner: int  # lease number
    log: str  # in the run's directory
    resumed: bool
    pid: int
    host: str
    started_at: str
    ended_at: str | None = None
    outcome: str | None = None  # SUCCEEDED, LOST (another one followed), FAILED, RESUMABLE, CANCELLED; None: not known
    error: str | None = None


@dataclass(frozen=True)
class Sample:
    """How far a stage was, and when."""

    at: str
    done: int


class History:
    """Reads what is new with every refresh(). Not for several threads."""

    def __init__(self, run: Run) -> None:
        """Raises: as Run.stored_state."""
        self.run = run
        self.owner = 0  # lease number of the last one
        self.attempts: dict[str, list[AttemptHistory]] = {}
        self.reasons: dict[str, tuple[str, ...]] = {}  # why each stage was run: the plan's reason, what changed
        self.first_samples: dict[str, Sample] = {}  # of the attempt under way
        self._last = Position(0, 0)
        self._state = run.stored_state()
        self.refresh()

    def refresh(self) -> RunState:
        """How far the last owner got, whether it still lives or not. Raises as Run.stored_state."""
        fresh = [place for place in positions(self.run.storage, self.run.events_relpath) if place > self._last]
        if self._last == Position(0, 0) or any(_gap(*pair) for pair in zip([self._last, *fresh], fresh, strict=False)):
            return self._read_all()
        if fresh:
            self._take(read_events(self.run.storage, self.run.events_relpath, self._last))
        return self._state

    def state(self, on_watch: Watch | None = None) -> RunState:
        """How far the run is; see Run.state."""
        return self.run.state(on_watch, self.refresh)

    def _read_all(self) -> RunState:
        """A listing of a directory that grows may leave an event out, so what is read in pieces is read again."""
        self._state = self.run.stored_state()
        self.attempts, self.reasons, self.first_samples = {}, {}, {}
        self._take(read_history(self.run.storage, self.run.events_relpath), with_state=False)
        return self._state

    def _take(self, entries: list[Entry], with_state: bool = True) -> None:
        for entry in entries:
            if with_state:
                state = after(self._state, entry.event)
                assert state is not None
                self._state = state
            self._note(entry)
            self._last = entry.position

    def _note(self, entry: Entry) -> None:
        match entry.event:
            case Planned() as event:
                self.owner = entry.position.owner
                for stage, reasons in event.reasons.items():
                    changes = reasons[1:] or self.reasons.get(stage, ())[1:]
                    self.reasons[stage] = (*reasons[:1], *changes)
            case Started() as event:
                self.first_samples.pop(event.stage, None)
                known = self.attempts.setdefault(event.stage, [])
                known.append(
                    AttemptHistory(
                        number=len(known) + 1,
                        owner=entry.position.owner,
                        log=event.log,
                        resumed=event.resumed,
                        pid=event.pid,
                        host=event.host,
                        started_at=event.at,
                    )
                )
            case Progress() as event:
                self.first_samples.setdefault(event.stage, Sample(event.at, event.done))
            case AttemptLost() as event:
                self._ended(event.stage, event.at, "LOST", event.error)
            case Finished() as event:
                self._ended(event.stage, event.recorded_at or event.at, Status.SUCCEEDED, None)
            case Failed() as event:
                self._ended(event.stage, event.at, event.status, event.error)
            case Queued() as event:  # it ended because another run holds the artifact
                self._ended(event.stage, event.at, "LOST", event.reason)

    def _ended(self, stage: str, at: str, outcome: str, error: str | None) -> None:
        known = self.attempts.get(stage)
        if known and known[-1].outcome is None and known[-1].owner == self.owner:
            known[-1] = replace(known[-1], ended_at=at, outcome=str(outcome), error=error)


def _gap(before: Position, behind: Position) -> bool:
    same_owner = before.owner == behind.owner
    return behind.sequence != (before.sequence + 1 if same_owner else 1)
