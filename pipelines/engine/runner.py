"""The driver of a pipeline run: each stage in turn, reused if its record exists, resumed if it was interrupted.

State is written before and after every step, the record of a stage last of all. So wherever a driver dies, the same
call resumes from there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from base.errors import UserError
from pipelines.engine.attempt import Attempt, note_reuse
from pipelines.engine.failures import Failure, classify
from pipelines.engine.graph import with_results
from pipelines.engine.headline import figures_of, identity_tags, settings_of
from pipelines.engine.interrupts import interruptible
from pipelines.engine.lease import (
    DEFAULT_RENEW_S,
    DEFAULT_TTL_S,
    Lease,
    LeaseHeldError,
    LeaseInfo,
    LeaseLostError,
    Watch,
    lease_holder,
)
from pipelines.engine.observer import Observer
from pipelines.engine.plan import Action, PlannedStage, plan
from pipelines.engine.provenance import git_commit
from pipelines.engine.records import Artifacts, FinishedStage
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run, RunInfo, RunState, StageState, Status, artifact_lease_relpath, run_id_of, utc_now
from pipelines.engine.stage import AnyNode, StageNode, StageResult
from pipelines.redact import redact
from pipelines.storage import Storage
from pipelines.tracking.replay import Backlog
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions, check_target

_WAIT_POLL_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Input of run_pipeline: the graph of its stages (pipelines.engine.graph.stage_graph), and the storage."""

    name: str
    graph: Sequence[AnyNode]
    storage: Storage
    config: Mapping[str, Any] = field(default_factory=dict)  # the whole pipeline file as resolved, for run.json
    config_path: str | None = None
    overrides: Sequence[str] | None = None  # `field=value` given beside the file; None: not known, as on a resume

    def plan(self) -> list[PlannedStage]:
        """Plan each stage as of now. Raises as pipelines.engine.plan.plan."""
        return plan(self.graph, self.storage)

    def holders(self, planned: Sequence[PlannedStage], on_watch: Watch | None = None) -> dict[str, LeaseInfo]:
        """Owners of the planned stages that are being made now, by stage."""
        found = {
            stage.name: lease_holder(
                self.storage, artifact_lease_relpath(stage.kind, stage.name, stage.fingerprint.digest), on_watch
            )
            for stage in planned
            if stage.action is not Action.REUSE
        }
        return {name: holder for name, holder in found.items() if holder is not None}

    def run_of(self, planned: Sequence[PlannedStage]) -> Run:
        """The run that a plan of this pipeline belongs to, started or not."""
        return Run(self.storage, run_id_of(self.name, {stage.name: stage.fingerprint for stage in planned}))


def run_pipeline(
    pipeline: Pipeline,
    tracking: TrackingOptions,
    ensure_cluster: Callable[[], None] = lambda: None,
    observer: Observer | None = None,
    lease_ttl_s: float = DEFAULT_TTL_S,
    lease_renew_s: float = DEFAULT_RENEW_S,
    expected: Run | None = None,
) -> RunResult:
    """Run the pipeline, or resume the run of the same stages. Call it from the main thread, so that it can be
    cancelled.

    Args:
        ensure_cluster: called before the first stage that really runs; starts or joins Ray.
        expected: the run that this must be; any other is refused.
    Returns: the result, whatever happened in the stages; errors of theirs are in `failure`.
    Raises: ConfigError, UserError: before anything is written, where the graph, an input or the storage is not in
            order. LeaseHeldError: another driver is running this run. SystemExit: on SIGTERM, after the state was
            saved.
    """
    observer = observer or Observer()
    planned = pipeline.plan()
    run = pipeline.run_of(planned)
    if expected is not None:
        _require_same_run(expected, run, planned)
    pipeline.storage.check_writable()
    if any(stage.action is not Action.REUSE for stage in planned):
        for target in tracking.targets:
            check_target(target, run.run_id)
    with (
        interruptible() as interrupt,
        Lease.acquire(
            pipeline.storage,
            run.lease_relpath,
            f"Run {run.run_id}",
            lease_ttl_s,
            lease_renew_s,
            remedy=run.remedy,
            on_watch=lambda holder, wait_s: observer.on_notice(watch_notice(holder, wait_s)),
        ) as lease,
    ):
        return _Driver(
            pipeline, planned, run, lease, tracking, ensure_cluster, observer, interrupt, lease_ttl_s, lease_renew_s
        ).drive()


def watch_notice(holder: LeaseInfo, wait_s: float) -> str:
    """Text for the user while an owner of another machine is watched."""
    return f"watching for up to {wait_s:.0f} s whether {holder.owner} still works on it ({holder.last_seen}) ..."


def _require_same_run(expected: Run, run: Run, planned: list[PlannedStage]) -> None:
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
        ttl_s: float,
        renew_s: float,
    ) -> None:
        self._ttl_s, self._renew_s = ttl_s, renew_s
        self._pipeline, self._planned, self._run, self._lease = pipeline, planned, run, lease
        self._ensure_cluster, self._observer, self._interrupt = ensure_cluster, observer, interrupt
        self._tracking = RunTracking(
            pipeline.storage, run.relpath, run.run_id, tracking, observer.on_notice, lease.number
        )
        self._before = _state_before(run)
        self._state = RunState(
            status=Status.RUNNING,
            started_at=(self._before and self._before.started_at) or utc_now(),
            checked_at=self._before and self._before.checked_at,
            stages={stage.name: self._first_state(stage) for stage in planned},
        )
        self._finished: dict[str, AnyNode] = {}
        self._did_work = False
        self._held: list[Lease] = [lease]  # losing any of these ends the drive
        self._interrupt_lock = threading.Lock()
        self._interrupts_end = False

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
            self._no_more_interrupts()
            self._lease.require_in_force()
        except BaseException as error:
            self._no_more_interrupts()
            failure = classify(self._lost() or error)
            leaving = error if isinstance(error, SystemExit) else None
        result = self._end(current, failure)
        if leaving is not None:
            raise leaving
        return result

    def _lost(self) -> LeaseLostError | None:
        """Why the work was interrupted, where it was because a lease was lost."""
        for lease in self._held:
            try:
                lease.require()
            except LeaseLostError as error:
                return error
        return None

    def _begin(self) -> None:
        info = self._info()
        self._run.write_info(info, self._lease.number)
        self._save()
        self._lease.on_beat(self._heartbeat)
        self._lease.on_lost(self._stop_work)
        self._observer.on_run_start(self._run, self._planned)
        tags = {
            "bmojo.pipeline": self._pipeline.name,
            "bmojo.storage": self._pipeline.storage.url,
            "mlflow.source.name": self._pipeline.config_path or self._pipeline.name,
            **identity_tags(self._pipeline.overrides),
        }
        all_reused = all(stage.action is Action.REUSE for stage in self._planned)
        self._tracking.start(redact(tags), redact(dict(self._pipeline.config)), all_reused)
        self._tracking.log_settings(settings_of(self._planned))

    def _info(self) -> RunInfo:
        try:
            created = self._run.info().created_at
        except UserError:  # the first drive; or what an earlier one wrote is damaged, and is written again
            created = utc_now()
        return RunInfo(
            run_id=self._run.run_id,
            name=self._pipeline.name,
            config=redact(dict(self._pipeline.config)),
            config_path=self._pipeline.config_path,
            base_dir=os.getcwd(),
            created_at=created,
            git_commit=git_commit(),
            fingerprints={stage.name: stage.fingerprint.digest for stage in self._planned},
        )

    def _stage(self, planned: PlannedStage) -> None:
        finished = self._find(planned) if planned.action is Action.REUSE else None
        if finished is None:
            with self._artifact_lease(planned) as lease:
                finished = self._find(planned)
                if finished is None:
                    self._execute(planned, lease)
                    return
        self._reuse(planned, finished)

    def _reuse(self, planned: PlannedStage, finished: FinishedStage) -> None:
        result = finished.result(planned.node.stage)
        last = self._tracking.last_lifecycle_event(planned.name)
        with self._tracking.open_stage(planned.name) as journal:
            note_reuse(journal, planned, finished, last)
        before = self._before and self._before.stages.get(planned.name)
        artifact = finished.artifact.relpath
        if before and before.artifact == artifact and before.started_at:  # made by this run: when stays told
            self._change(
                planned,
                status=Status.SUCCEEDED,
                artifact=artifact,
                started_at=before.started_at,
                finished_at=before.finished_at or finished.record.created_at,
            )
        else:
            self._change(planned, status=Status.SUCCEEDED, reused=True, artifact=artifact)
        self._finish(planned, result, reused=True)

    def _execute(self, planned: PlannedStage, artifact_lease: Lease) -> None:
        self._did_work = True
        self._change(planned, status=Status.RUNNING, artifact=planned.artifact.relpath, started_at=utc_now())
        if planned.node.stage.uses_cluster:
            self._ensure_cluster()
        self._observer.on_stage_start(planned)

        def on_metrics(step: int, values: Mapping[str, float]) -> None:
            self._observer.on_metrics(planned, step, values)

        def before_record() -> None:
            artifact_lease.require_in_force()
            self._lease.require_in_force()

        inputs = with_results(planned.node, self._finished)
        result = Attempt(planned, inputs, self._tracking, artifact_lease.number).make(on_metrics, before_record)
        self._change(planned, status=Status.SUCCEEDED, finished_at=utc_now())
        self._finish(planned, result)

    def _finish(self, planned: PlannedStage, result: StageResult[Any], reused: bool = False) -> None:
        node = planned.node
        inputs = with_results(node, self._finished)
        self._finished[node.name] = StageNode(node.name, node.stage, node.config, inputs, result)
        self._tracking.log_figures(figures_of(self._planned, planned, result.output))
        state = self._state.stages[planned.name]
        self._observer.on_stage_end(planned, state.model_copy(update={"reused": reused}))

    def _end(self, current: PlannedStage | None, failure: Failure | None) -> RunResult:
        status = failure.status if failure else Status.SUCCEEDED
        failed_stage = current.name if failure and current else None
        undelivered: tuple[Backlog, ...] = ()
        try:
            if failure:  # also after a lost lease: the file is this driver's own, an successor has another
                self._record_failure(current, failure)
            else:
                self._record_success()
        except Exception as error:
            log.warning("Could not save that the run ended as %s: %s", status, error)
        try:
            undelivered = self._tracking.stop(status, {"bmojo.error": failure.text} if failure else {})
        except Exception as error:
            log.warning("Tracking did not end in order: %s", error)
        result = RunResult(
            run=self._run,
            status=status,
            stages=self._finished,
            failed_stage=failed_stage,
            failure=failure,
            undelivered=undelivered,
        )
        self._observer.on_run_end(result)
        return result

    def _record_success(self) -> None:
        changes: dict[str, Any] = {"status": Status.SUCCEEDED, "finished_at": utc_now()}
        before = self._before
        if not self._did_work and before is not None:
            if before.status is Status.SUCCEEDED:
                changes = {"status": Status.SUCCEEDED, "finished_at": before.finished_at, "checked_at": utc_now()}
            else:  # the driver before died, or was stopped, after its last stage
                ends = [stage.finished_at for stage in self._state.stages.values() if stage.finished_at]
                changes["finished_at"] = max(ends, default=changes["finished_at"])
        self._state = self._state.model_copy(update=changes)
        self._save()

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
        self._save()

    @contextmanager
    def _artifact_lease(self, planned: PlannedStage) -> Iterator[Lease]:
        """The right to write the artifact; where another run is making it, this one waits."""
        relpath = artifact_lease_relpath(planned.kind, planned.name, planned.fingerprint.digest)
        told = False
        while True:
            try:
                lease = Lease.acquire(
                    self._pipeline.storage,
                    relpath,
                    f"Artifact {planned.artifact.url}",
                    self._ttl_s,
                    self._renew_s,
                    on_watch=lambda holder, wait_s: self._observer.on_notice(
                        f"{planned.name}: {watch_notice(holder, wait_s)}"
                    ),
                )
                break
            except LeaseHeldError as error:
                if not told:
                    self._observer.on_stage_wait(planned, error.holder)
                    told = True
                time.sleep(_WAIT_POLL_S)
                self._lease.require()
        with lease:
            lease.on_lost(self._stop_work)
            self._held.append(lease)
            yield lease
            self._held.remove(lease)

    def _heartbeat(self) -> None:
        """In the lease's thread: stop the work when the run was cancelled."""
        if self._run.cancel_requested(self._lease.number):
            self._stop_work()

    def _stop_work(self) -> None:
        """From another thread: interrupt the main thread, once, while it works."""
        with self._interrupt_lock:
            if not self._interrupts_end:
                self._interrupts_end = True
                self._interrupt()

    def _no_more_interrupts(self) -> None:
        while True:
            try:
                with self._interrupt_lock:
                    self._interrupts_end = True
                return
            except KeyboardInterrupt:  # one that was under way
                continue

    def _change(self, planned: PlannedStage, **changes: Any) -> None:
        self._lease.require()
        self._state = self._state.with_stage(planned.name, **changes)
        self._save()

    def _save(self) -> None:
        self._run.write_state(self._state, self._lease.number)

    def _first_state(self, planned: PlannedStage) -> StageState:
        """As an earlier drive left it, if it is finished; so a drive that dies early does not hide when it ran."""
        before = self._before and self._before.stages.get(planned.name)
        if before and before.status is Status.SUCCEEDED and planned.action is Action.REUSE:
            return before
        return StageState(kind=planned.kind, fingerprint=planned.fingerprint.digest)

    def _find(self, planned: PlannedStage) -> FinishedStage | None:
        return Artifacts(self._pipeline.storage).find(planned.kind, planned.name, planned.fingerprint)


def _state_before(run: Run) -> RunState | None:
    """Last state of the drive before: it has the times of what is now found finished."""
    try:
        return run.stored_state()
    except UserError:  # the first drive; or one that died before it wrote a state, or whose state is damaged
        return None
