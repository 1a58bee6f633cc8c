"""Drives a pipeline run: each stage in turn, reused where its record is there, carried on with where it was
interrupted.

State is written before and after every step, the record of a stage last of all; so wherever a driver dies, the same
call goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.engine.artifact import ArtifactDir
from pipelines.engine.failures import Failure, classify
from pipelines.engine.interrupts import interruptible
from pipelines.engine.lease import DEFAULT_RENEW_S, DEFAULT_TTL_S, Lease, LeaseHeldError, LeaseLostError
from pipelines.engine.observer import Observer
from pipelines.engine.plan import Action, PlannedStage, plan, stage_of_kind
from pipelines.engine.provenance import git_commit
from pipelines.engine.records import Artifacts, FinishedStage
from pipelines.engine.runs import Run, RunInfo, RunState, StageState, Status, run_id_of, utc_now
from pipelines.engine.stage_run import StageRun, note_reuse
from pipelines.engine.storage import Storage
from pipelines.errors import UserError
from pipelines.stages.base import Stage, StageConfig, StageInput, StageOutput
from pipelines.tracking.redact import redact
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions

_WAIT_POLL_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """What run_pipeline drives: stages by name, the implementation of their kinds, and the storage."""

    name: str
    stages: Mapping[str, StageConfig]
    kinds: Mapping[str, Stage]
    storage: Storage
    config: Mapping[str, Any] = field(default_factory=dict)  # the whole pipeline file as resolved, for run.json
    config_path: str | None = None

    def plan(self) -> list[PlannedStage]:
        """What would happen to each stage now. Raises as pipelines.engine.plan.plan."""
        return plan(self.stages, self.kinds, self.storage)

    def run(self) -> Run:
        """The run that these stages belong to, started or not."""
        return self._run_of(self.plan())

    def _run_of(self, planned: list[PlannedStage]) -> Run:
        return Run(self.storage, run_id_of(self.name, {stage.name: stage.fingerprint for stage in planned}))


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `failure` and `failed_stage` are None after success."""

    run: Run
    status: Status
    outputs: dict[str, StageOutput]
    artifacts: dict[str, ArtifactDir]
    failed_stage: str | None
    failure: Failure | None
    undelivered: int  # journal events that MLflow has not got yet; the next run or sync delivers them


def run_pipeline(
    pipeline: Pipeline,
    tracking: TrackingOptions,
    ensure_cluster: Callable[[], None] = lambda: None,
    observer: Observer | None = None,
    lease_ttl_s: float = DEFAULT_TTL_S,
    lease_renew_s: float = DEFAULT_RENEW_S,
) -> RunResult:
    """Run the pipeline, or carry on with the run of the same stages. Call it from the main thread, so that it can be
    cancelled.

    Args: ensure_cluster: called before the first stage that really runs; starts or joins Ray.
    Returns: the result, whatever happened in the stages; errors of theirs are in `failure`.
    Raises: ConfigError, UserError: before anything is written, where the graph, an input or the storage is not in
    order;
        LeaseHeldError: another driver is at work on this run. SystemExit: on SIGTERM, after the state was saved.
    """
    planned = pipeline.plan()
    run = pipeline._run_of(planned)
    pipeline.storage.check_writable()
    with (
        interruptible() as interrupt,
        Lease.acquire(pipeline.storage, run.lease_relpath, f"Run {run.run_id}", lease_ttl_s, lease_renew_s) as lease,
    ):
        return _Driver(
            pipeline, planned, run, lease, tracking, ensure_cluster, observer or Observer(), interrupt
        ).drive()


class _Driver:
    """One drive of one run by the owner of its lease."""

    def __init__(
        self,
        pipeline: Pipeline,
        planned: list[PlannedStage],
        run: Run,
        lease: Lease,
        tracking: TrackingOptions,
        ensure_cluster: Callable[[], None],
        observer: Observer,
        interrupt: Callable[[], None],
    ) -> None:
        self._pipeline, self._planned, self._run, self._lease = pipeline, planned, run, lease
        self._ensure_cluster, self._observer, self._interrupt = ensure_cluster, observer, interrupt
        self._tracking = RunTracking(pipeline.storage, run.relpath, run.run_id, tracking, observer.on_notice)
        self._state = RunState(
            status=Status.RUNNING,
            started_at=utc_now(),
            stages={stage.name: StageState(kind=stage.kind, fingerprint=stage.fingerprint.digest) for stage in planned},
        )
        self._earlier = _stages_before(run)
        self._inputs: dict[str, StageInput] = {}
        self._stop_seen = False

    def drive(self) -> RunResult:
        """All stages; then the end, in good order."""
        current: PlannedStage | None = None
        failure: Failure | None = None
        leaving: SystemExit | None = None
        try:
            self._begin()
            for current in self._planned:
                self._lease.require()
                self._stage(current)
        except BaseException as error:
            failure = classify(self._lost() or error)
            leaving = error if isinstance(error, SystemExit) else None
        result = self._end(current, failure)
        if leaving is not None:
            raise leaving
        return result

    def _lost(self) -> LeaseLostError | None:
        """Why the work was interrupted, where it was because another driver took over."""
        try:
            self._lease.require()
        except LeaseLostError as error:
            return error
        return None

    def _begin(self) -> None:
        self._run.clear_cancel()
        self._run.write_info(self._info())
        self._run.write_state(self._state)
        self._lease.on_beat(self._heartbeat)
        self._observer.on_run_start(self._run, self._planned)
        tags = {
            "bmojo.pipeline": self._pipeline.name,
            "bmojo.storage": self._pipeline.storage.url,
            "bmojo.git_commit": git_commit() or "unknown",
            "mlflow.source.name": self._pipeline.config_path or self._pipeline.name,
            "mlflow.source.git.commit": (git_commit() or "unknown").removesuffix("-dirty"),
        }
        all_reused = all(stage.action is Action.REUSE for stage in self._planned)
        self._tracking.start(redact(tags), redact(dict(self._pipeline.config)), all_reused)

    def _info(self) -> RunInfo:
        created = self._run.info().created_at if self._run.exists() else utc_now()
        return RunInfo(
            run_id=self._run.run_id,
            name=self._pipeline.name,
            config=redact(dict(self._pipeline.config)),
            config_path=self._pipeline.config_path,
            created_at=created,
            git_commit=git_commit(),
            fingerprints={stage.name: stage.fingerprint.digest for stage in self._planned},
        )

    def _stage(self, planned: PlannedStage) -> None:
        finished = self._find(planned)
        if finished is None:
            with self._artifact_lease(planned) as lease:
                finished = self._find(planned)
                if finished is None:
                    self._execute(planned, lease)
                    return
        self._reuse(planned, finished)

    def _reuse(self, planned: PlannedStage, finished: FinishedStage) -> None:
        output = finished.output(self._kind(planned))
        with self._tracking.open_stage(planned.name) as journal:
            note_reuse(journal, planned, finished)
        before = self._earlier.get(planned.name)
        made_here = before is not None and before.artifact == finished.artifact.url
        self._change(
            planned,
            status=Status.SUCCEEDED,
            reused=True,
            artifact=finished.artifact.url,
            started_at=before.started_at if before and made_here else None,
            finished_at=before.finished_at if before and made_here else None,
        )
        self._finished(planned, finished.artifact, output)

    def _execute(self, planned: PlannedStage, artifact_lease: Lease) -> None:
        self._change(planned, status=Status.RUNNING, artifact=planned.artifact.url, started_at=utc_now())
        self._ensure_cluster()
        self._observer.on_stage_start(planned)

        def on_metrics(step: int, values: Mapping[str, float]) -> None:
            self._observer.on_metrics(planned, step, values)

        def before_record() -> None:
            artifact_lease.require()
            self._lease.require()

        inputs = {name: self._inputs[name] for name in planned.config.needs}
        stage_run = StageRun(self._kind(planned), planned, inputs, self._tracking)
        output = stage_run.run(on_metrics, before_record)
        self._change(planned, status=Status.SUCCEEDED, finished_at=utc_now())
        self._finished(planned, planned.artifact, output)

    def _finished(self, planned: PlannedStage, artifact: ArtifactDir, output: StageOutput) -> None:
        self._inputs[planned.name] = StageInput(
            name=planned.name,
            kind=planned.kind,
            fingerprint=planned.fingerprint.digest,
            artifact=artifact,
            config=planned.config,
            output=output,
        )
        self._observer.on_stage_end(planned, self._state.stages[planned.name])

    def _end(self, current: PlannedStage | None, failure: Failure | None) -> RunResult:
        status = failure.status if failure else Status.SUCCEEDED
        failed_stage = current.name if failure and current else None
        undelivered = 0
        try:
            if failure and not self._lease.is_lost:  # a run that was taken over is no longer ours to write
                self._record_failure(current, failure)
            elif not failure:
                self._state = self._state.model_copy(update={"status": status, "finished_at": utc_now()})
                self._run.write_state(self._state)
            self._run.clear_cancel()
        except Exception as error:
            log.warning("Could not save that the run ended as %s: %s", status, error)
        try:
            undelivered = self._tracking.stop(status, {"bmojo.error": failure.text} if failure else {})
        except Exception as error:
            log.warning("Tracking did not end in order: %s", error)
        result = RunResult(
            run=self._run,
            status=status,
            outputs={name: finished.output for name, finished in self._inputs.items()},
            artifacts={name: finished.artifact for name, finished in self._inputs.items()},
            failed_stage=failed_stage,
            failure=failure,
            undelivered=undelivered,
        )
        self._observer.on_run_end(result)
        return result

    def _record_failure(self, current: PlannedStage | None, failure: Failure) -> None:
        now, text = utc_now(), failure.text
        if failure.details:
            where = self._run.write_text(f"errors/{current.name if current else 'start'}.txt", failure.details)
            text += f" (traceback: {where})"
        changes = {"status": failure.status, "finished_at": now, "error": text}
        self._state = self._state.model_copy(update=changes)
        if current is not None and self._state.stages[current.name].status is not Status.SUCCEEDED:
            self._state = self._state.with_stage(current.name, **changes)
            self._observer.on_stage_end(current, self._state.stages[current.name])
        self._run.write_state(self._state)

    @contextmanager
    def _artifact_lease(self, planned: PlannedStage) -> Iterator[Lease]:
        """The right to write the artifact; where another run is making it, this one waits."""
        relpath = f"leases/{planned.kind}-{planned.name}-{planned.fingerprint.short}"
        told = False
        while True:
            try:
                lease = Lease.acquire(self._pipeline.storage, relpath, f"Artifact {planned.artifact.url}")
                break
            except LeaseHeldError as error:
                if not told:
                    self._observer.on_stage_wait(planned, error.holder)
                    told = True
                time.sleep(_WAIT_POLL_S)
                self._lease.require()
        with lease:
            yield lease

    def _heartbeat(self) -> None:
        """In the lease's thread: stop the work when the run was cancelled or taken over."""
        if not self._stop_seen and (self._lease.is_lost or self._run.cancel_requested()):
            self._stop_seen = True
            self._interrupt()

    def _change(self, planned: PlannedStage, **changes: Any) -> None:
        self._state = self._state.with_stage(planned.name, **changes)
        self._run.write_state(self._state)

    def _find(self, planned: PlannedStage) -> FinishedStage | None:
        return Artifacts(self._pipeline.storage).find(planned.kind, planned.name, planned.fingerprint)

    def _kind(self, planned: PlannedStage) -> Stage:
        return stage_of_kind(planned.kind, self._pipeline.kinds, planned.name)


def _stages_before(run: Run) -> dict[str, StageState]:
    """What an earlier drive of the run wrote of its stages: when it made what is now reused."""
    try:
        return run.state().stages
    except UserError:  # the first drive, or one that died before it wrote a state
        return {}
