"""The end of a run, as reported to its caller."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.engine.failures import Failure
from pipelines.engine.runs import Run, Status
from pipelines.engine.stage import AnyNode
from pipelines.tracking.replay import Backlog


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run. `failure` and `failed_stage` are None after success."""

    run: Run
    status: Status
    stages: dict[str, AnyNode]  # the finished ones, by name
    failed_stage: str | None
    failure: Failure | None
    undelivered: tuple[Backlog, ...]  # what the sinks have not got yet; the next run or sync delivers it
