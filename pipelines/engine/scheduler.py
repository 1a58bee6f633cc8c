"""The scheduler of a pipeline run: starts each stage as soon as what it reads is there and the cluster has room.

What happens goes into the run's event log (own_history.py), and the record of a stage is the last thing its process
writes. So wherever the scheduler or an attempt dies, the same call resumes from there (docs/design/0006).

The scheduler only starts processes, waits, and writes: it never imports Ray, sets no signal handler and no variable.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from base.errors import UserError
from pipelines.engine.attempt import note_reuse
from pipelines.engine.dispatch import AttemptEnded, Dispatcher
from pipelines.engine.events import (
    AttemptLost,
    Failed,
    Finished,
    Noted,
    Progress,
    Queued,
    Status,
)
from pipelines.engine.failures import EXIT_CANCELLED, EXIT_RESUMABLE, Failure, classify
from pipelines.engine.gates import Gates
from pipelines.engine.graph import inputs_of, with_results
from pipelines.engine.headline import costs_of, figures_of, run_tags, settings_of
from pipelines.engine.lease import DEFAULT_RENEW_S, DEFAULT_TTL_S, Lease, lease_holder
from pipelines.engine.observer import Observer
from pipelines.engine.own_history import OwnHistory
from pipelines.engine.pipeline import Pipeline, lease_of, require_same_run, watch_notice
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.policy import next_attempt
from pipelines.engine.processes import Cluster, Launcher, Outcome, ProcessLauncher, lost_cluster, lost_record
from pipelines.engine.records import Artifacts, FinishedStage
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode, StageNode, StageResult
from pipelines.engine.under_way import StageRun
from pipelines.engine.verdict import Verdict, gravest
from pipelines.errors import InfrastructureError
from pipelines.redact import redact
from pipelines.tracking.replay import Backlog
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions, check_target

_POLL_S = 1.0  # for room, and for artifacts that other runs make
_TERMINATED_GRACE_S = 12.0  # for attempts to end when this process was told to: it has 30 s itself, at least
_CANCELLED_GRACE_S = 120.0  # the same on `bmojo cancel`: training writes a checkpoint first
_KILLED_S = 10.0

log = logging.getLogger(__name__)


def run_pipeline(
    pipeline: Pipeline,
    tracking: TrackingOptions,
    cluster: Cluster,
    observer: Observer | None = None,
    lease_ttl_s: float = DEFAULT_TTL_S,
    lease_renew_s: float = DEFAULT_RENEW_S,
    expected: Run | None = None,
    launcher: Launcher | None = None,
) -> RunResult:
    """Run the pipeline, or resume the run of the same stages.

    Args:
        expected: the run that this must be; any other is refused.
        launcher: starts the attempts; by default each in a process of its own.
    Returns: the result, whatever happened in the stages; errors of theirs are in `failure`.
    Raises: ConfigError, UserError: before anything is written, where the graph, an input or the storage is not in
            order. LeaseHeldError: another driver is running this run. SystemExit: on SIGTERM, after the log says so.
    """
    observer = observer or Observer()
    planned = pipeline.plan()
    run = pipeline.run_of(planned)
    if expected is not None:
        require_same_run(expected, run, planned)
    pipeline.storage.check_writable()
    if any(stage.action is not Action.REUSE for stage in planned):
        for target in tracking.targets:
            check_target(target, run.run_id)
    with Lease.acquire(
        pipeline.storage,
        run.lease_relpath,
        f"Run {run.run_id}",
        lease_ttl_s,
        lease_renew_s,
        remedy=run.remedy,
        on_watch=lambda holder, wait_s: observer.on_notice(watch_notice(holder, wait_s)),
    ) as lease:
        return _Scheduler(
            pipeline, planned, run, lease, tracking, cluster, observer, lease_ttl_s, lease_renew_s, launcher
        ).drive()


@dataclass(frozen=True)
class _Noticed:
    stage: str
    text: str


@dataclass(frozen=True)
class _LeaseLost:
    pass


@dataclass(frozen=True)
class _CancelAsked:
    pass


class _Scheduler:
    """One drive of one run by the owner of its lease. All but the callbacks of other threads runs in one thread."""

    def __init__(
        self,
        pipeline: Pipeline,
        planned: list[PlannedStage],
        run: Run,
        lease: Lease,
        tracking: TrackingOptions,
        cluster: Cluster,
        observer: Observer,
        ttl_s: float,
        renew_s: float,
        launcher: Launcher | None,
    ) -> None:
        self._pipeline, self._planned, self._run, self._lease = pipeline, planned, run, lease
        self._cluster, self._observer = cluster, observer
        self._tracking = RunTracking(
            pipeline.storage, run.relpath, run.run_id, tracking, observer.on_notice, lease.number
        )
        self._launcher = launcher or ProcessLauncher(
            cluster.environment, self._tracking.log_dir, ("ray",) if _any_on_cluster(planned) else ()
        )
        self._dispatcher = Dispatcher(run.run_id, lease, self._tracking, cluster, self._launcher, ttl_s, renew_s)
        self._history: OwnHistory
        self._gates: Gates
        self._stages = {stage.name: StageRun(stage) for stage in planned}
        self._finished: dict[str, AnyNode] = {}
        self._failures: dict[str, Failure] = {}
        self._stopping: Failure | None = None  # why nothing is started any more
        self._messages: queue.SimpleQueue[AttemptEnded | _LeaseLost | _CancelAsked] = queue.SimpleQueue()
        self._notices: queue.SimpleQueue[_Noticed] = queue.SimpleQueue()

    # ---- the drive

    def drive(self) -> RunResult:
        """All stages; then the end, in good order."""
        failure: Failure | None = None
        leaving: SystemExit | None = None
        try:
            self._begin()
            self._loop()
            self._lease.require_in_force()
        except BaseException as error:
            failure = classify(error)
            leaving = error if isinstance(error, SystemExit) else None
            self._wind_up(failure)
        result = self._end(failure)
        if leaving is not None:
            raise leaving
        return result

    def _begin(self) -> None:
        if self._work_left():
            self._launcher.prepare()  # it imports while we go on
        if _any_on_cluster(self._planned):
            self._cluster.prepare()
        self._history = OwnHistory(self._run, self._lease, self._pipeline, self._planned)
        self._gates = Gates(self._history, self._tracking)
        self._lease.on_beat(self._heartbeat)
        self._lease.on_lost(lambda: self._messages.put(_LeaseLost()))
        self._observer.on_run_start(self._run, self._planned)
        tags = run_tags(self._pipeline, self._planned, self._run, is_resumed=self._history.is_resumed)
        self._tracking.start(redact(tags), redact(dict(self._pipeline.config)), not self._has_news())
        self._tracking.log_settings(settings_of(self._planned))

    def _work_left(self) -> bool:
        return any(stage.action is not Action.REUSE for stage in self._planned)

    def _has_news(self) -> bool:
        """Whether something is left to do, or a result that is there is judged in another way than before."""
        return self._work_left() or any(
            self._gates.would_change_by(planned, self._find(planned)) for planned in self._planned
        )

    def _loop(self) -> None:
        while True:
            self._lease.require()
            if self._stopping is None:
                self._start_what_is_ready()
            self._tell_notices()
            self._note_progress()
            running = [stage for stage in self._stages.values() if stage.is_running]
            if not running and (self._stopping is not None or not self._ready()):
                return
            self._stop_what_is_late(running)
            try:
                self._handle(self._messages.get(timeout=_POLL_S if running else self._shortest_wait_s()))
            except queue.Empty:
                continue

    def _shortest_wait_s(self) -> float:
        pauses = [stage.not_before - time.monotonic() for stage in self._ready()]
        return max(0.01, min([_POLL_S, *pauses]))

    def _handle(self, message: AttemptEnded | _LeaseLost | _CancelAsked) -> None:
        match message:
            case AttemptEnded():
                self._attempt_ended(message)
            case _LeaseLost():
                self._lease.require()
            case _CancelAsked():
                if self._stopping is None:
                    self._stop(Failure(Status.CANCELLED, "cancelled", None, EXIT_CANCELLED), _CANCELLED_GRACE_S)

    def _tell_notices(self) -> None:
        """Tell what attempts noted: before it is told how they ended, and in this thread, which writes the history."""
        while not self._notices.empty():
            noticed = self._notices.get()
            self._history.append(Noted(stage=noticed.stage, text=noticed.text))
            self._observer.on_notice(f"{noticed.stage}: {noticed.text}")

    # ---- starting

    def _ready(self) -> list[StageRun]:
        """Stages that could start but for room and pauses."""
        return [
            stage
            for stage in self._stages.values()
            if not stage.is_settled
            and not stage.is_running
            and all(name in self._finished and name not in self._gates.closed for name in inputs_of(stage.planned.node))
        ]

    def _start_what_is_ready(self) -> None:
        progressed = True
        while progressed:  # reusing one may make others ready
            progressed = False
            for stage in self._ready():
                if stage.not_before <= time.monotonic():
                    progressed |= self._reuse_or_start(stage)

    def _reuse_or_start(self, stage: StageRun) -> bool:
        """Return True if the stage is finished by that."""
        twin = self._running_twin_of(stage)
        if twin is not None:
            stage.may_be_finished = True
            self._queue(stage, f"waits for {twin.name}, which is making the same artifact", 0.0)
            return False
        if stage.may_be_finished:
            stage.may_be_finished = False
            finished = self._find(stage.planned)
            if finished is not None:
                self._reuse(stage, finished)
                return True
        self._start(stage)
        return False

    def _running_twin_of(self, stage: StageRun) -> StageRun | None:
        """A stage under way that differs from this one only in what cannot change the result."""
        identity = (stage.planned.kind, stage.planned.fingerprint.digest)
        return next(
            (
                other
                for other in self._stages.values()
                if other.is_running and (other.planned.kind, other.planned.fingerprint.digest) == identity
            ),
            None,
        )

    def _reuse(self, stage: StageRun, finished: FinishedStage) -> None:
        planned = stage.planned
        result = finished.result(planned.node.stage)
        last = self._tracking.last_lifecycle_event(planned.name)
        with self._tracking.open_stage(planned.name) as journal:
            note_reuse(journal, planned, finished, last)
        event = Finished(stage=planned.name, artifact=finished.artifact.relpath, recorded_at=finished.record.created_at)
        if self._history.would_change_by(event):  # else it says so already
            self._history.append(event)
        self._settle(stage, finished, result, reused=True)

    def _start(self, stage: StageRun) -> None:
        planned = stage.planned
        holder = lease_holder(self._pipeline.storage, lease_of(planned))
        if holder is not None:
            stage.may_be_finished = True
            self._queue(stage, f"waits for {holder.owner}, who is making the same artifact", 2 * _POLL_S)
            return
        running = [other.planned for other in self._stages.values() if other.is_running]
        reason = self._dispatcher.why_no_room(planned, running)
        if reason is not None:
            self._queue(stage, reason, _POLL_S)
            return
        try:
            started = self._dispatcher.start(
                stage,
                with_results(planned.node, self._finished),
                on_end=self._messages.put,
                on_metrics=lambda step, values: self._observer.on_metrics(planned, step, values),
                on_notice=lambda text: self._notices.put(_Noticed(planned.name, text)),
            )
        except (UserError, InfrastructureError) as error:
            self._attempt_failed(stage, classify(error))
            return
        self._history.append(started)
        self._observer.on_stage_start(planned)
        if any(not other.is_settled and not other.is_running for other in self._stages.values()):
            self._launcher.prepare()

    def _queue(self, stage: StageRun, reason: str, pause_s: float) -> None:
        stage.not_before = time.monotonic() + pause_s
        if stage.queued_for != reason:
            stage.queued_for = reason
            self._history.append(Queued(stage=stage.name, reason=reason))
            self._observer.on_stage_queued(stage.planned, reason)

    # ---- ending

    def _attempt_ended(self, message: AttemptEnded) -> None:
        stage = self._stages[message.stage]
        if not stage.is_running or message.attempt != stage.attempt:
            return
        stage.end()
        self._tell_notices()
        if (sample := stage.sample()) is not None:
            self._history.append(Progress(stage=stage.name, **sample))
        outcome = message.outcome
        if outcome.is_done:
            finished = self._find(stage.planned)
            if finished is not None:
                result = finished.result(stage.planned.node.stage)
                self._history.append(Finished(stage=stage.name, artifact=finished.artifact.relpath))
                self._settle(stage, finished, result)
                return
            outcome = Outcome(failure=lost_record(stage.planned))
        if outcome.held_by is not None:
            stage.not_before, stage.may_be_finished = 0.0, True  # it says so itself, as its owner is alive
            return
        assert outcome.failure is not None
        self._attempt_failed(stage, outcome.failure)

    def _attempt_failed(self, stage: StageRun, failure: Failure) -> None:
        failure = stage.stopped_for or failure
        stage.stopped_for = None
        planned = stage.planned
        if self._stopping is None:
            mark = planned.node.stage.mark(planned.config, planned.artifact)
            retry = next_attempt(planned.config, stage.tally, failure, mark)
            if retry is not None:
                stage.tally = retry.tally
                stage.not_before = time.monotonic() + retry.pause_s
                stage.may_be_finished = True
                self._history.append(
                    AttemptLost(
                        stage=planned.name,
                        attempt=stage.attempt,
                        error=failure.text,
                        budget=retry.budget,
                        left=retry.left,
                        pause_s=retry.pause_s,
                    )
                )
                self._observer.on_notice(
                    f"{planned.name}: {failure.text.rstrip('.')}. It starts again in {retry.pause_s:.0f} s "
                    f"({retry.left} more {retry.budget} left)"
                )
                self._launcher.prepare()
                return
        self._failed(stage, failure)

    def _failed(self, stage: StageRun, failure: Failure) -> None:
        text = failure.text
        if failure.details:
            where = self._run.write_text(f"errors/{stage.name}.txt", failure.details)
            text += f" (traceback: {where})"
        stage.is_settled = True
        self._failures[stage.name] = failure
        self._history.append(Failed(stage=stage.name, status=failure.status, error=text))
        self._observer.on_stage_end(stage.planned, self._history.state.stages[stage.name])
        if stage.planned.config.on_failure == "stop" and self._stopping is None:
            self._stop(
                Failure(Status.RESUMABLE, f"stopped because {stage.name} failed", None, EXIT_RESUMABLE),
                _TERMINATED_GRACE_S,
            )

    def _settle(self, stage: StageRun, finished: FinishedStage, result: StageResult[Any], reused: bool = False) -> None:
        node = stage.planned.node
        stage.is_settled = True
        inputs = with_results(node, self._finished)
        state = self._history.state.stages[node.name]
        costs = costs_of(self._planned, stage.planned, finished.record.duration_s, state.attempts)
        self._tracking.log_figures({**figures_of(self._history.state.info.kinds, node.name, result.output), **costs})
        failure = self._gates.judge(stage.planned, result)
        if failure is not None:
            self._failed(stage, failure)
            return
        self._finished[node.name] = StageNode(node.name, node.stage, node.config, inputs, result)
        state = self._history.state.stages[node.name]
        self._observer.on_stage_end(stage.planned, state.model_copy(update={"reused": reused}))

    def _stop_what_is_late(self, running: Sequence[StageRun]) -> None:
        """Stop attempts that take longer than they may, and those whose cluster is gone."""
        lost = self._cluster.is_lost()
        for stage in running:
            if lost and stage.planned.node.stage.uses_cluster:
                stage.kill_for(lost_cluster())
            stage.stop_if_late()

    def _stop(self, reason: Failure, grace_s: float) -> None:
        """Start nothing more, and have what runs end."""
        self._stopping = reason
        for stage in self._stages.values():
            if stage.is_running:
                stage.stop_for(reason, grace_s)

    def _wind_up(self, reason: Failure) -> None:
        """After an error in this thread: end what runs, and hear how."""
        self._stop(reason, _TERMINATED_GRACE_S if reason.status is not Status.FAILED else 0.0)
        deadline = time.monotonic() + _TERMINATED_GRACE_S + _KILLED_S
        while any(stage.is_running for stage in self._stages.values()) and time.monotonic() < deadline:
            try:
                message = self._messages.get(timeout=0.2)
                if isinstance(message, AttemptEnded):
                    self._attempt_ended(message)
            except queue.Empty:
                pass
            except Exception as error:  # the log is out of reach, or no longer ours
                log.warning("Could not note how a stage ended: %s", error)
            for stage in self._stages.values():
                stage.stop_if_late()
        for stage in self._stages.values():
            stage.kill()

    def _end(self, failure: Failure | None) -> RunResult:
        verdict = self._verdict(failure)
        undelivered: tuple[Backlog, ...] = ()
        try:
            self._launcher.close()
            self._history.append(verdict.event(self._run))
        except Exception as error:
            log.warning("Could not save that the run ended as %s: %s", verdict.status, error)
        try:
            tags = {"bmojo.error": verdict.failure.text} if verdict.failure else {}
            undelivered = self._tracking.stop(verdict.status, tags)
        except Exception as error:
            log.warning("Tracking did not end in order: %s", error)
        self._cluster.close()
        result = RunResult(
            run=self._run,
            status=verdict.status,
            stages=self._finished,
            failures=self._failures,
            failed_stage=verdict.stage,
            failure=verdict.failure,
            undelivered=undelivered,
        )
        self._observer.on_run_end(result)
        return result

    def _verdict(self, failure: Failure | None) -> Verdict:
        """Judge the run. Args: failure: an error in this thread, not in a stage."""
        failure = failure or (self._stopping if self._stopping and not self._failures else None)
        if failure is not None:
            return Verdict(next(iter(self._failures), None), failure)
        return gravest(self._failures) if self._failures else self._gates.verdict()

    # ---- beside the stages

    def _note_progress(self) -> None:
        live = {}
        for stage in self._stages.values():
            sample = stage.sample() if stage.is_running else None
            if sample is None:
                continue
            live[stage.name] = sample
            if stage.sample_is_due():
                self._history.append(Progress(stage=stage.name, **sample))
        self._tracking.note_live(live)

    def _heartbeat(self) -> None:
        """In the lease's thread: see whether the run was cancelled."""
        if self._run.cancel_requested(self._lease.number):
            self._messages.put(_CancelAsked())

    def _find(self, planned: PlannedStage) -> FinishedStage | None:
        return Artifacts(self._pipeline.storage).find(planned.kind, planned.name, planned.fingerprint)


def _any_on_cluster(planned: Sequence[PlannedStage]) -> bool:
    return any(stage.action is not Action.REUSE and stage.node.stage.uses_cluster for stage in planned)
