"""One attempt at a stage, in its own process: its lease, its context, its journal, its record."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from base.errors import UserError
from pipelines.engine.events import Status, utc_now
from pipelines.engine.failures import classify
from pipelines.engine.fingerprint import flatten
from pipelines.engine.lease import Lease, LeaseHeldError
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.process import submitted_job
from pipelines.engine.processes import Outcome, StageJob
from pipelines.engine.provenance import git_commit, library_versions, machine, user_name
from pipelines.engine.records import Artifacts, FinishedStage, StageRecord, write_record
from pipelines.engine.runs import artifact_lease_relpath
from pipelines.engine.stage import StageContext, StageOutput
from pipelines.errors import InfrastructureError
from pipelines.faults import explained_disk
from pipelines.redact import redact
from pipelines.tracking.journal import Journal
from pipelines.tracking.notices import warnings_noted
from pipelines.tracking.system_metrics import SystemMetrics

_LOCK_TIMEOUT_S = 20.0  # the process of an attempt that was killed may take a moment to let go

log = logging.getLogger(__name__)


def make(job: StageJob, stop: threading.Event, interrupt: Callable[[], None]) -> Outcome:
    """Do the stage's work and write its record, as the owner of the artifact's lease.

    Args: stop: set when the attempt must end soon. interrupt: raises KeyboardInterrupt in this thread, for others.
    Raises: whatever the stage raises.
    """
    planned = job.planned
    storage = planned.artifact.storage
    try:
        lease = Lease.acquire(
            storage,
            artifact_lease_relpath(planned.kind, planned.name, planned.fingerprint.digest),
            f"Artifact {planned.artifact.url}",
            job.lease_ttl_s,
            job.lease_renew_s,
        )
    except LeaseHeldError as error:
        return Outcome(held_by=error.holder)
    with lease:
        if Artifacts(storage).find(planned.kind, planned.name, planned.fingerprint) is not None:
            return Outcome()  # another run made it meanwhile
        lease.on_lost(interrupt)
        try:
            if job.connect is not None:
                job.connect()
            _make_as_owner(job, lease, stop)
        except BaseException:
            lease.require()  # why the work was interrupted
            raise
    return Outcome()


def _make_as_owner(job: StageJob, lease: Lease, stop: threading.Event) -> None:
    started = time.monotonic()
    planned = job.planned
    with Journal(job.journal, lock_timeout_s=_LOCK_TIMEOUT_S) as journal:
        note_start(journal, planned, reused=False)
        try:
            output = _work(job, journal, stop)
            lease.require_in_force()
            record = _record(planned, lease.number, output, time.monotonic() - started)
            journal.log_json("record.json", record.model_dump(mode="json"))
            journal.flush()
            write_record(planned.artifact, record)
        except BaseException as error:
            failure = classify(error)
            try:
                journal.write("end", status=failure.status, tags={"bmojo.error": failure.text})
            except (InfrastructureError, UserError) as second:  # a full disk, which may be the failure
                log.warning("%s does not say how the stage ended: %s", journal.path, second)
            raise
        note_end(journal, record)


def _work(job: StageJob, journal: Journal, stop: threading.Event) -> StageOutput:
    planned = job.planned
    context = StageContext(
        name=planned.name,
        fingerprint=planned.fingerprint.digest,
        artifact=planned.artifact,
        journal=journal,
        run_id=job.run_id,
        content=planned.fingerprint.parts.content,
        attempt=job.attempt,
        stop=stop,
    )
    with ExitStack() as stack:
        stack.enter_context(warnings_noted(journal))
        if job.system_metrics:
            stack.enter_context(SystemMetrics(journal, Path(planned.artifact.local)))
        stack.enter_context(explained_disk(planned.artifact.local))
        output: StageOutput = planned.node.stage.run(planned.config, job.inputs, context)
    return output


def _record(planned: PlannedStage, lease_number: int, output: StageOutput, duration_s: float) -> StageRecord:
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
        hardware=machine(),
        lease_number=lease_number,
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
        "bmojo.ray_job": submitted_job() or "none",
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
