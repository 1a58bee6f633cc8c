"""One attempt at a stage inside a drive: its context, its journal, its record."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from base.errors import UserError
from pipelines.engine.failures import classify
from pipelines.engine.fingerprint import flatten
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.provenance import git_commit, library_versions, user_name
from pipelines.engine.records import FinishedStage, StageRecord, write_record
from pipelines.engine.runs import Status, utc_now
from pipelines.engine.stage import StageContext, StageInputs, StageOutput, StageResult
from pipelines.errors import InfrastructureError
from pipelines.faults import explained_disk
from pipelines.redact import redact
from pipelines.tracking.journal import Journal, workers_journal
from pipelines.tracking.run_tracking import JournalWatch, RunTracking
from pipelines.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)


class Attempt:
    """Makes one stage's result and writes its record."""

    def __init__(self, planned: PlannedStage, inputs: StageInputs, tracking: RunTracking, lease_number: int) -> None:
        self._planned, self._inputs, self._tracking, self._lease_number = planned, inputs, tracking, lease_number

    def make(
        self, on_metrics: Callable[[int, Mapping[str, float]], None], before_record: Callable[[], None]
    ) -> StageResult[StageOutput]:
        """Do the stage's work. `before_record` is called when it is done, and may still refuse it by raising."""
        started = time.monotonic()
        with self._tracking.open_stage(self._planned.name) as journal:
            note_start(journal, self._planned, reused=False)
            try:
                output = self._work(journal, on_metrics)
                before_record()
                record = self._record(output, time.monotonic() - started)
                journal.log_json("record.json", record.model_dump(mode="json"))
                journal.flush()
                write_record(self._planned.artifact, record)
            except BaseException as error:
                failure = classify(error)
                try:
                    journal.write("end", status=failure.status, tags={"bmojo.error": failure.text})
                except (InfrastructureError, UserError) as second:  # a full disk, which may be the failure
                    log.warning("%s does not say how the stage ended: %s", journal.path, second)
                raise
            note_end(journal, record)
        return StageResult(record.fingerprint, self._planned.artifact, output)

    def _work(self, journal: Journal, on_metrics: Callable[[int, Mapping[str, float]], None]) -> StageOutput:
        context = StageContext(
            name=self._planned.name,
            fingerprint=self._planned.fingerprint.digest,
            artifact=self._planned.artifact,
            journal=journal,
            content=self._planned.fingerprint.parts.content,
        )
        paths = [journal.path, workers_journal(journal)]
        with ExitStack() as stack:
            stack.enter_context(JournalWatch(paths, on_metrics))
            if self._tracking.options.system_metrics:
                stack.enter_context(SystemMetrics(journal, Path(self._planned.artifact.local)))
            stack.enter_context(explained_disk(self._planned.artifact.local))
            output: StageOutput = self._planned.node.stage.run(self._planned.config, self._inputs, context)
        return output

    def _record(self, output: StageOutput, duration_s: float) -> StageRecord:
        planned = self._planned
        return StageRecord(
            kind=planned.kind,
            name=planned.name,
            fingerprint=planned.fingerprint.digest,
            config=redact(planned.config.model_dump(mode="json")),
            parts=planned.fingerprint.parts,
            inputs={one.name: one.fingerprint for one in planned.fingerprint.parts.inputs},
            output=output.model_dump(mode="json"),
            files=planned.artifact.describe_files(),
            created_at=utc_now(),
            duration_s=round(duration_s, 3),
            versions=library_versions(),
            git_commit=git_commit(),
            lease_number=self._lease_number,
        )


def note_start(journal: Journal, planned: PlannedStage, reused: bool) -> None:
    """Journal that the stage begins, and what it is."""
    config = planned.config.model_dump(mode="json")
    tags = {
        "mlflow.user": user_name(),
        "bmojo.kind": planned.kind,
        "bmojo.fingerprint": planned.fingerprint.digest,
        "bmojo.artifact": planned.artifact.url,
        "bmojo.reused": str(reused).lower(),
        "bmojo.resumed": str(planned.action is Action.RESUME).lower(),
        "bmojo.git_commit": git_commit() or "unknown",
        "bmojo.ray_job": os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID") or "none",
    }
    journal.write("start", tags=redact(tags), artifact_url=planned.artifact.url)
    journal.log_params(flatten(config))
    journal.log_json("config.json", config)


def note_end(journal: Journal, record: StageRecord) -> None:
    """Journal that the stage is done."""
    journal.write("end", status=Status.SUCCEEDED, tags={"bmojo.duration_s": str(record.duration_s)})


def note_reuse(
    journal: Journal, planned: PlannedStage, finished: FinishedStage, last: Mapping[str, object] | None
) -> None:
    """Journal that another run's result is used; or that this run's is, if its driver died before saying so.

    Args: last: the last lifecycle event of the stage's journals.
    """
    if last is None:
        note_start(journal, planned, reused=True)
        journal.log_json("record.json", finished.record.model_dump(mode="json"))
    if last is None or last.get("status") != Status.SUCCEEDED:
        note_end(journal, finished.record)
