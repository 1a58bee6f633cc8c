"""The history of a run as its owner writes it: the event log, and the state that follows from it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from base.errors import UserError
from pipelines.engine.events import Event, Planned, RunInfo, utc_now
from pipelines.engine.headline import masked_overrides
from pipelines.engine.lease import Lease
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.provenance import git_commit, machine
from pipelines.engine.runs import Run
from pipelines.engine.state import RunState, after
from pipelines.redact import redact


class OwnHistory:
    """Begins with what the owner found and planned; appending keeps log and state together. For one thread."""

    def __init__(self, run: Run, lease: Lease, pipeline: Pipeline, planned: Sequence[PlannedStage]) -> None:
        """Seal the logs of the owners before, and say what is planned. Raises LeaseLostError."""
        self._lease = lease
        self._log = run.log(lease.number)
        self._state = _state_before(run)
        self.is_resumed = self._state is not None
        reused = tuple(stage.name for stage in planned if stage.action is Action.REUSE)
        self.append(
            Planned(
                event="resumed" if self.is_resumed else "planned",
                info=_info(run, pipeline, planned),
                reused=reused,
                reasons={stage.name: (stage.reason, *stage.changes) for stage in planned if stage.name not in reused},
            )
        )

    @property
    def state(self) -> RunState:
        """How far the run is, by all that was appended."""
        assert self._state is not None
        return self._state

    def append(self, event: Event) -> None:
        """Add an event; it is durable when this returns. Raises LeaseLostError: the run has another owner."""
        self._lease.require()
        self._log.append(event)
        self._state = after(self._state, event)

    def would_change_by(self, event: Event) -> bool:
        """Whether the event says anything new."""
        return after(self._state, event) != self._state


def _info(run: Run, pipeline: Pipeline, planned: Sequence[PlannedStage]) -> RunInfo:
    return RunInfo(
        run_id=run.run_id,
        name=pipeline.name,
        config=redact(dict(pipeline.config)),
        config_path=pipeline.config_path,
        overrides=None if pipeline.overrides is None else tuple(masked_overrides(pipeline.overrides)),
        base_dir=os.getcwd(),
        created_at=utc_now(),
        git_commit=git_commit(),
        hardware=machine(),
        fingerprints={stage.name: stage.fingerprint.digest for stage in planned},
        kinds={stage.name: stage.kind for stage in planned},
    )


def _state_before(run: Run) -> RunState | None:
    """State that the owner before left: it has the times of what is now found finished."""
    try:
        return run.stored_state()
    except UserError:  # the first owner; or the log is damaged, and a new history begins
        return None
