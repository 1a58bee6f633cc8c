"""The end of a run, as reported to its caller."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.engine.events import Status
from pipelines.engine.failures import Failure
from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode
from pipelines.tracking.replay import Backlog


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run. `failure`, the gravest, and its stage are None after success."""

    run: Run
    status: Status
    stages: dict[str, AnyNode]  # the finished ones, by name
    failures: dict[str, Failure]  # of the stages that failed for good, by name
    failed_stage: str | None
    failure: Failure | None
    undelivered: tuple[Backlog, ...]  # what the sinks have not got yet; the next run or sync delivers it
