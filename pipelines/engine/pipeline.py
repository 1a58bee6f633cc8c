"""A pipeline ready to be planned and run: its graph of stages, and the storage that its results live in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from base.errors import UserError
from pipelines.engine.lease import LeaseInfo, Watch, lease_holder
from pipelines.engine.plan import Action, PlannedStage, plan
from pipelines.engine.runs import Run, artifact_lease_relpath, run_id_of
from pipelines.engine.stage import AnyNode
from pipelines.storage import Storage


@dataclass(frozen=True)
class Pipeline:
    """Input of run_pipeline: the graph of its stages (pipelines.engine.graph.stage_graph), and the storage."""

    name: str
    graph: Sequence[AnyNode]
    storage: Storage
    config: Mapping[str, Any] = field(default_factory=dict)  # the whole pipeline file as resolved, for the log
    config_path: str | None = None
    overrides: Sequence[str] | None = None  # `field=value` given beside the file; None: not known, as on a resume

    def plan(self) -> list[PlannedStage]:
        """Plan each stage as of now. Raises as pipelines.engine.plan.plan."""
        return plan(self.graph, self.storage)

    def holders(self, planned: Sequence[PlannedStage], on_watch: Watch | None = None) -> dict[str, LeaseInfo]:
        """Owners of the planned stages that are being made now, by stage."""
        found = {
            stage.name: lease_holder(self.storage, lease_of(stage), on_watch)
            for stage in planned
            if stage.action is not Action.REUSE
        }
        return {name: holder for name, holder in found.items() if holder is not None}

    def run_of(self, planned: Sequence[PlannedStage]) -> Run:
        """The run that a plan of this pipeline belongs to, started or not."""
        return Run(self.storage, run_id_of(self.name, {stage.name: stage.fingerprint for stage in planned}))


def lease_of(stage: PlannedStage) -> str:
    """The lease of whoever makes the stage's artifact."""
    return artifact_lease_relpath(stage.kind, stage.name, stage.fingerprint.digest)


def watch_notice(holder: LeaseInfo, wait_s: float) -> str:
    """Text for the user while an owner of another machine is watched."""
    return f"watching for up to {wait_s:.0f} s whether {holder.owner} still works on it ({holder.last_seen}) ..."


def require_same_run(expected: Run, run: Run, planned: list[PlannedStage]) -> None:
    """Raises UserError where what was asked to be resumed would now be another run."""
    if expected.run_id == run.run_id:
        return
    before = expected.info().fingerprints
    changed = [stage for stage in planned if before.get(stage.name) != stage.fingerprint.digest]
    reasons = [f"  {stage.name}: {'; '.join(stage.changes) or stage.reason}" for stage in changed]
    raise UserError(
        f"Run {expected.run_id} cannot be resumed as it was: its input files or this program's code changed since. "
        "These stages would give another result now:\n"
        + "\n".join(reasons)
        + f"\nRestore what they read to go on with {expected.run_id}; or run the pipeline file (bmojo run CONFIG): "
        f"that starts {run.run_id}, which reuses what has not changed."
    )
