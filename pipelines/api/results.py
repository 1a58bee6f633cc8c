"""What a stage gave, and what is known of how it came about."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from base.errors import UserError
from pipelines.engine.events import Status
from pipelines.engine.fingerprint import FingerprintParts
from pipelines.engine.history import History
from pipelines.engine.lease import Watch
from pipelines.engine.records import StageRecord, read_record
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts, StageOutput
from pipelines.engine.state import RunState, StageState
from pipelines.stages import STAGES


class StageOutputFacts(Facts):
    """The result of a finished stage."""

    run: str
    stage: str
    kind: str
    fingerprint: str
    artifact: str  # path or URL of the folder with its files
    created_at: str
    output: dict[str, Any]  # of the record
    figures: dict[str, float]  # the final ones, by which runs are compared


class AttemptFacts(Facts):
    """One attempt at a stage. Times are ISO 8601 in UTC."""

    number: int
    driver: int  # number of the drive of the run that it belongs to
    resumed: bool
    started_at: str
    ended_at: str | None
    outcome: str | None  # SUCCEEDED, LOST (another one followed), FAILED, RESUMABLE, CANCELLED; None: it ended unseen
    error: str | None
    log: str  # path or URL
    pid: int
    host: str


class StageMetadata(Facts):
    """What is known of a stage: from its record if it is finished, else from the run."""

    run: str
    stage: str
    kind: str
    status: Status
    reused: bool
    fingerprint: str
    reasons: tuple[str, ...]  # why this run did it: the plan's reason, then what changed since the last result
    attempts: tuple[AttemptFacts, ...]
    config: dict[str, Any]
    parts: FingerprintParts | None  # what the fingerprint is made of
    inputs: dict[str, str]  # fingerprints by stage
    artifact: str | None
    created_at: str | None
    duration_s: float | None  # of the attempt that finished it
    num_files: int | None
    size_bytes: int | None  # of the files that the record lists: without shards and checkpoints
    versions: dict[str, str]
    git_commit: str | None
    lease_number: int | None


class RunMetadata(Facts):
    """What is known of a run."""

    run: str
    name: str
    status: Status
    url: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    drives: int  # times that it was started or resumed
    config_path: str | None
    overrides: tuple[str, ...] | None  # given beside it, secrets masked; None: not known
    base_dir: str | None  # where its relative paths start
    git_commit: str | None
    hardware: dict[str, str]  # of the machine that scheduled it
    config: dict[str, Any]  # as resolved, secrets masked
    stages: tuple[StageMetadata, ...]


def stage_output(run: Run, stage: str) -> StageOutputFacts:
    """The result of a finished stage. Raises UserError: it is not finished, or its record is damaged or gone."""
    state = run.stored_state()
    found = state.stages[stage]
    record = stage_record(run, found)
    if record is None or found.artifact is None:
        now = run.state().stages[stage].status
        raise UserError(
            f"Stage {stage} of run {run.run_id} has no output: it is {now}."
            if now is not Status.SUCCEEDED
            else f"The output of stage {stage} of run {run.run_id} was deleted; run the pipeline again to have it made."
        )
    output = output_of(record)
    return StageOutputFacts(
        run=run.run_id,
        stage=stage,
        kind=found.kind,
        fingerprint=record.fingerprint,
        artifact=run.storage.url_of(found.artifact),
        created_at=record.created_at,
        output=record.output,
        figures={} if output is None else output.figures(),
    )


def run_metadata(run: Run, on_watch: Watch | None = None) -> RunMetadata:
    """What is known of a run and its stages. Raises UserError: it has no readable history, or a record is damaged."""
    history = History(run)
    state = history.state(on_watch)
    info = state.info
    return RunMetadata(
        run=run.run_id,
        name=info.name,
        status=state.status,
        url=run.url,
        created_at=info.created_at,
        started_at=state.started_at,
        finished_at=state.finished_at,
        drives=state.owners,
        config_path=info.config_path,
        overrides=info.overrides,
        base_dir=info.base_dir,
        git_commit=info.git_commit,
        hardware=info.hardware,
        config=info.config,
        stages=tuple(_stage(history, state, name) for name in state.stages),
    )


def stage_metadata(run: Run, stage: str, on_watch: Watch | None = None) -> StageMetadata:
    """What is known of one stage. Raises as run_metadata."""
    history = History(run)
    return _stage(history, history.state(on_watch), stage)


def stage_record(run: Run, stage: StageState) -> StageRecord | None:
    """The record of a finished stage; None if there is none. Raises DamagedError."""
    artifact = run.artifact_of(stage)
    record = None if artifact is None else read_record(artifact)
    return record if record is not None and record.fingerprint == stage.fingerprint else None


def output_of(record: StageRecord) -> StageOutput | None:
    """The output as its kind of stage has it; None of a kind that this program does not know."""
    kind = next((known for known in STAGES if known.kind == record.kind), None)
    if kind is None:
        return None
    try:
        output: StageOutput = kind.output_type.model_validate(record.output)
    except ValidationError:  # another version of this program made it
        return None
    return output


def _stage(history: History, state: RunState, name: str) -> StageMetadata:
    run, stage = history.run, state.stages[name]
    record = stage_record(run, stage)
    files = None if record is None else record.files.values()
    return StageMetadata(
        run=run.run_id,
        stage=name,
        kind=stage.kind,
        status=stage.status,
        reused=stage.reused,
        fingerprint=stage.fingerprint,
        reasons=history.reasons.get(name, ()),
        attempts=tuple(
            AttemptFacts(
                number=attempt.number,
                driver=attempt.owner,
                resumed=attempt.resumed,
                started_at=attempt.started_at,
                ended_at=attempt.ended_at,
                outcome=attempt.outcome,
                error=attempt.error,
                log=run.storage.url_of(f"{run.relpath}/{attempt.log}"),
                pid=attempt.pid,
                host=attempt.host,
            )
            for attempt in history.attempts.get(name, ())
        ),
        config=record.config if record is not None else state.info.config.get("stages", {}).get(name, {}),
        parts=record.parts if record is not None else None,
        inputs=record.inputs if record is not None else {},
        artifact=run.storage.url_of(stage.artifact) if stage.artifact else None,
        created_at=record.created_at if record is not None else None,
        duration_s=record.duration_s if record is not None else None,
        num_files=None if files is None else len(files),
        size_bytes=None if files is None else sum(file.size_bytes for file in files),
        versions=record.versions if record is not None else {},
        git_commit=record.git_commit if record is not None else state.info.git_commit,
        lease_number=record.lease_number if record is not None else None,
    )
