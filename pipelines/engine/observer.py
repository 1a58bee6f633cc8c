"""Events of a run for whoever watches it; the command line draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.engine.plan import PlannedStage
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run
from pipelines.engine.state import StageState


class Observer:
    """Override what is of interest. on_metrics and on_notice come from other threads than the rest.

    Several stages run at once, so calls about them are mixed.
    """

    def on_run_start(self, run: Run, plan: Sequence[PlannedStage]) -> None:
        """The run is ours; its stages follow."""

    def on_stage_queued(self, stage: PlannedStage, reason: str) -> None:
        """The stage could start but for `reason`: no room, or another run is making the same artifact."""

    def on_stage_start(self, stage: PlannedStage) -> None:
        """The stage is about to run or resume."""

    def on_metrics(self, stage: PlannedStage, step: int, values: Mapping[str, float]) -> None:
        """The running stage journalled metrics."""

    def on_stage_end(self, stage: PlannedStage, state: StageState) -> None:
        """The stage was reused, succeeded, or did not."""

    def on_notice(self, text: str) -> None:
        """Something worth a line, such as a tracking server that does not answer."""

    def on_run_end(self, result: RunResult) -> None:
        """The run ended; tracking is drained."""
