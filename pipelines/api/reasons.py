"""Why a run or a stage is as it is, in sentences: what it waits for, why it runs again, why it ended so."""

from __future__ import annotations

from shlex import quote

from base.errors import UserError
from pipelines.api.finding import needs_of
from pipelines.api.results import stage_record
from pipelines.api.run_status import missing_inputs
from pipelines.engine.events import Status
from pipelines.engine.history import History
from pipelines.engine.lease import Watch, lease_holder
from pipelines.engine.placement import asked
from pipelines.engine.runs import Run, artifact_lease_relpath
from pipelines.engine.stage import Facts, Resources
from pipelines.engine.state import RunState, StageState


class StageReasons(Facts):
    """Why a stage is as it is."""

    stage: str
    status: Status
    sentences: tuple[str, ...]


class RunReasons(Facts):
    """Why a run is as it is."""

    run: str
    status: Status
    sentences: tuple[str, ...]
    stages: tuple[StageReasons, ...]


def why(run: Run, stage: str | None = None, on_watch: Watch | None = None) -> RunReasons:
    """Reasons for the state of a run and of its stages, or of one stage. Raises UserError: no readable history."""
    history = History(run)
    state = history.state(on_watch)
    names = list(state.stages) if stage is None else [stage]
    return RunReasons(
        run=run.run_id,
        status=state.status,
        sentences=tuple(_of_run(history, state, on_watch)),
        stages=tuple(
            StageReasons(
                stage=name,
                status=state.stages[name].status,
                sentences=tuple(_of_stage(history, state, name, on_watch)),
            )
            for name in names
        ),
    )


def _of_run(history: History, state: RunState, on_watch: Watch | None) -> list[str]:
    run = history.run
    resume = f"Resume it: bmojo resume {run.run_id} --storage {quote(run.storage.url)}."
    failed = [name for name, stage in state.stages.items() if stage.status is Status.FAILED]
    match state.status:
        case Status.RUNNING:
            holder = run.holder(on_watch)
            by = f", driven by {holder}, {holder.last_seen}" if holder is not None else ""
            return [f"It is running{by}."]
        case Status.SUCCEEDED:
            return [f"It succeeded at {state.finished_at}: every stage has its record."]
        case Status.FAILED if failed:
            return [
                f"It failed because {_listed(failed)} failed.",
                "The same command runs it again once that is fixed; what is finished is reused.",
            ]
        case Status.FAILED:
            return [f"It failed: {_sentence(state.error)}"]
        case Status.STOPPED:
            return [
                f"It was stopped: {_sentence(state.error)}",
                "With another gate the same command goes on from what is finished.",
            ]
        case Status.CANCELLED:
            asked_for = run.cancel_requested(history.owner)
            how = "somebody asked for it (bmojo cancel)" if asked_for else "its driver was interrupted (Ctrl-C)"
            return [f"It was cancelled at {state.finished_at}: {how}.", resume]
        case Status.RESUMABLE if run.stored_state().status is Status.RUNNING:
            return [
                f"It did not end: {_sentence(state.error)}",
                "A driver that ends without a word was killed, ran out of memory, or its machine went down.",
                resume,
            ]
        case _:
            return [f"It ended without all of its results: {_sentence(state.error)}", resume]


def _of_stage(history: History, state: RunState, name: str, on_watch: Watch | None) -> list[str]:
    stage = state.stages[name]
    said = [*_how_it_is(history, state, name), *_who_else_works(history.run, name, stage, on_watch)]
    if not stage.reused:
        said += _why_it_runs(history, name)
    attempts = history.attempts.get(name, [])
    shown = attempts if stage.status in (Status.SUCCEEDED, Status.RUNNING, Status.QUEUED) else attempts[:-1]
    said += [f"Attempt {attempt.number} was lost: {_sentence(attempt.error)}" for attempt in shown if attempt.error]
    return said


def _how_it_is(history: History, state: RunState, name: str) -> list[str]:
    run, stage = history.run, state.stages[name]
    match stage.status:
        case Status.SUCCEEDED if stage.reused:
            return _why_reused(run, name, stage)
        case Status.SUCCEEDED:
            gate = [f"Nothing may go on from its result: {_sentence(stage.gate)}"] if stage.gate else []
            return [f"It finished at {stage.finished_at}.", *gate]
        case Status.RUNNING:
            attempts = history.attempts.get(name, [])
            return [f"It has been running since {stage.started_at}, attempt {len(attempts)}, as process {stage.pid} on "
                    f"{stage.host}."]  # fmt: skip
        case Status.QUEUED:
            reason = _sentence(stage.reason)
            return [f"It {reason}" if reason.startswith("waits ") else f"It waits: {reason}", *_asked(state, name)]
        case Status.PENDING:
            return _why_not_started(state, name)
        case _:
            kept = " What it did is kept." if stage.status is not Status.FAILED and stage.artifact else ""
            log = f" Its output: {run.storage.url_of(f'{run.relpath}/{stage.log}')}." if stage.log else ""
            return [f"It is {stage.status}: {_sentence(stage.error or state.error)}{kept}{log}"]


def _why_not_started(state: RunState, name: str) -> list[str]:
    missing = missing_inputs(name, state)
    is_over = state.status is not Status.RUNNING
    closed = [need for need in needs_of(state.info, name) if state.stages[need].gate]
    if closed:
        return [f"It is not run, because the gate of {_listed(closed)} is closed."]
    if not missing:
        return ["It was not started before the run ended." if is_over else "It is about to start."]
    said = [f"It needs {_listed([f'{need} ({status})' for need, status in missing.items()])}."]
    stuck = [need for need, status in missing.items() if status in (Status.FAILED, Status.RESUMABLE, Status.CANCELLED)]
    if stuck and not is_over:
        said.append(f"It cannot start in this drive of the run, because {_listed(stuck)} ended without a result.")
    elif is_over:
        said.append("The run ended before that was there.")
    return said


def _why_reused(run: Run, name: str, stage: StageState) -> list[str]:
    try:
        record = stage_record(run, stage)
    except UserError:
        record = None
    if record is None:
        return ["Its result was there when the run began, and is there no more."]
    as_name = f" as {record.name}" if record.name != name else ""
    return [
        f"It was not run: its result was there, made{as_name} at {record.created_at} from the same settings, code and "
        "inputs."
    ]


def _why_it_runs(history: History, name: str) -> list[str]:
    reason, *changes = history.reasons.get(name, ("",))
    if not reason:
        return []
    said = [f"Why this run did not reuse a result: {reason}."]
    return said + [f"Changed since the last result: {change}." for change in changes]


def _who_else_works(run: Run, name: str, stage: StageState, on_watch: Watch | None) -> list[str]:
    if stage.status not in (Status.QUEUED, Status.RESUMABLE, Status.CANCELLED):
        return []
    holder = lease_holder(run.storage, artifact_lease_relpath(stage.kind, name, stage.fingerprint), on_watch)
    return [] if holder is None else [f"Its artifact is being made by {holder}, {holder.last_seen}."]


def _asked(state: RunState, name: str) -> list[str]:
    """What the stage asks of the cluster, if it waits for room."""
    reason = state.stages[name].reason or ""
    stored = state.info.config.get("stages", {}).get(name, {}).get("resources")
    if "room" not in reason or stored is None:
        return []
    resources = Resources.model_validate(stored)
    return [f"Its settings ask for {resources.num_workers} workers with {asked(resources)} each."]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(text: str | None) -> str:
    text = " ".join((text or "nothing is known").split())
    return text if text.endswith((".", "!", "?", ")")) else f"{text}."
