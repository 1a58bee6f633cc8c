"""The gates of a run: results that are there, but not good enough for the stages that need them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pipelines.engine.events import Gated, Status
from pipelines.engine.failures import EXIT_STOPPED, EXIT_USER, Failure
from pipelines.engine.own_history import OwnHistory
from pipelines.engine.plan import PlannedStage
from pipelines.engine.records import FinishedStage
from pipelines.engine.stage import ClosedGate, StageResult
from pipelines.engine.verdict import Verdict
from pipelines.tracking.run_tracking import RunTracking


class Gates:
    """Judges results, and says what is new about them to the event log and the trackers."""

    def __init__(self, history: OwnHistory, tracking: RunTracking) -> None:
        self._history, self._tracking = history, tracking
        self._closed: dict[str, str] = {}  # of stages that succeeded, with the reasons

    def would_change_by(self, planned: PlannedStage, finished: FinishedStage | None) -> bool:
        """Whether the result, if there is one, is judged in another way than before."""
        gate = finished and _gate_of(planned, finished.result(planned.node.stage))
        return (gate.reason if gate else None) != self._history.state.stages[planned.name].gate

    def judge(self, planned: PlannedStage, result: StageResult[Any]) -> Failure | None:
        """Judge the result of a stage. Returns the failure of a stage that its own gate fails."""
        gate = _gate_of(planned, result)
        event = Gated(stage=planned.name, reason=gate.reason if gate else None)
        if self._history.would_change_by(event):
            self._history.append(event)
            text = gate.reason if gate else "open"
            self._tracking.log_tags({f"bmojo.gate.{planned.name}": text})
            status = Status.FAILED if gate and gate.fails else Status.SUCCEEDED
            with self._tracking.open_stage(planned.name) as journal:
                journal.write("end", status=status, tags={"bmojo.gate": text})
        if gate is None:
            return None
        if gate.fails:
            return Failure(Status.FAILED, f"gate: {gate.reason}", None, EXIT_USER)
        self._closed[planned.name] = gate.reason
        return None

    @property
    def closed(self) -> Container[str]:
        """Stages that succeeded, and from which nothing may go on."""
        return self._closed

    def verdict(self) -> Verdict:
        """Why a run without failures did not do all its stages, and the first stage that it is of."""
        if not self._closed:
            return Verdict(None, None)
        text = "; ".join(f"gate of {name}: {reason}" for name, reason in self._closed.items())
        return Verdict(next(iter(self._closed)), Failure(Status.STOPPED, text, None, EXIT_STOPPED))


def _gate_of(planned: PlannedStage, result: StageResult[Any]) -> ClosedGate | None:
    return planned.node.stage.closed_gate(planned.config, result.output)
