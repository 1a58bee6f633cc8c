"""`bmojo status`, `list`, `cancel`, `unlock`, `delete`, `sync`: looking after runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import RunArgument, StorageOption, console, error_console
from pipelines.cli.progress import delivery_progress
from pipelines.cli.running import STATUS_STYLES
from pipelines.engine.failures import EXIT_RESUMABLE, EXIT_USER
from pipelines.engine.records import FinishedStage, read_record
from pipelines.engine.runs import dead_leases, delete_run, find_run, unlock_run
from pipelines.engine.runs import list_runs as all_runs
from pipelines.stages import STAGES
from pipelines.storage import open_storage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.trouble import Cause

if TYPE_CHECKING:
    from pipelines.engine.lease import LeaseInfo
    from pipelines.engine.runs import Run
    from pipelines.engine.state import RunState, StageState
    from pipelines.tracking.sink import Target

RequiredRun = Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a pipeline's name.")]


def status(run: RunArgument = None, storage: StorageOption = "runs") -> None:
    """Show how far a run is, stage by stage, and since when."""
    found = _find(run, storage)
    found.info()  # says so if it is damaged
    holder = found.holder(_watched)
    state = found.state(_watched) if holder is None else found.stored_state()
    console.print(f"[bold]{found.run_id}[/] {_styled(state.status)} {escape(found.url)}", soft_wrap=True)
    if holder is not None:
        console.print(f"  running now, by {escape(str(holder))}, {holder.last_seen}", soft_wrap=True)
    if state.started_at:
        ended = f", ended {_shown_time(state.finished_at)}" if state.finished_at else ""
        console.print(f"  started {_shown_time(state.started_at)}{ended}")
    if state.checked_at:
        console.print(f"  checked again at {_shown_time(state.checked_at)}: all of it was still there")
    table = Table("stage", "kind", "status", "started", "time", "artifact", box=None, pad_edge=False)
    for name, stage in state.stages.items():
        shown = "[green]reused[/]" if stage.reused else _styled(stage.status)
        table.add_row(
            name, stage.kind, shown, _shown_time(stage.started_at), _elapsed(stage), escape(stage.artifact or "")
        )
    console.print(table)
    for name, stage in state.stages.items():
        if summary := _summary(found, stage):
            console.print(f"{name}: {escape(summary)}", soft_wrap=True)
    for name, stage in state.stages.items():
        if stage.error:
            console.print(f"[red]{name}:[/] {escape(stage.error)}", soft_wrap=True)
    if state.error and not any(stage.error for stage in state.stages.values()):
        console.print(f"[red]error:[/] {escape(state.error)}", soft_wrap=True)
    if state.status == "RESUMABLE":
        console.print(f"Resume: bmojo resume {found.run_id} --storage {quote(found.storage.url)}", soft_wrap=True)


def list_runs(storage: StorageOption = "runs") -> None:
    """List all runs of a storage, the latest last."""
    runs = all_runs(open_storage(storage))
    if not runs:
        console.print(f"There are no runs in {escape(storage)}. Start one: bmojo run CONFIG.")
        return
    table = Table("run", "status", "stages", "started", "time", box=None, pad_edge=False)
    with ThreadPoolExecutor(max_workers=16) as pool:  # drivers of other machines are watched side by side
        states = list(pool.map(_state_or_error, runs))
    for run, state in zip(runs, states, strict=True):
        if isinstance(state, UserError):
            table.add_row(run.run_id, "[red]damaged[/]", "", "", "")
            continue
        done = sum(stage.status == "SUCCEEDED" for stage in state.stages.values())
        table.add_row(
            run.run_id,
            _styled(state.status),
            f"{done}/{len(state.stages)}",
            _shown_time(state.started_at),
            _elapsed(state),
        )
    console.print(table)
    for run, state in zip(runs, states, strict=True):
        if isinstance(state, UserError):
            error_console.print(f"[red]{run.run_id}:[/] {escape(str(state))}", soft_wrap=True)


def _state_or_error(run: Run) -> RunState | UserError:
    try:
        run.info()
        return run.state(_watched)
    except UserError as error:
        return error


def cancel(run: RequiredRun, storage: StorageOption = "runs") -> None:
    """Ask the driver of a run to stop; what is finished is kept and the run can be resumed."""
    found = _find(run, storage)
    holder = found.request_cancel(_watched)
    console.print(f"Asked {escape(str(holder))} to stop {found.run_id}; it does so within seconds.")


def delete(
    run: RequiredRun,
    storage: StorageOption = "runs",
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Also delete its artifacts that no other run names.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run's state and, with --artifacts, what it made. MLflow keeps its record of the run."""
    found = _find(run, storage)
    holder = found.holder(_watched)
    if holder is not None:
        raise UserError(f"Run {found.run_id} is running now, by {holder}. {found.remedy}")
    what = f"{found.run_id} and its artifacts" if artifacts else f"the state of {found.run_id} (its artifacts stay)"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    for url in delete_run(found, artifacts, _watched):
        console.print(f"Deleted {escape(url)}")


def unlock(
    run: RequiredRun,
    storage: StorageOption = "runs",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Break the hold that a dead driver of another machine left on a run, and on the artifacts it was making.

    Not needed on the driver's own machine, where a dead process is seen. Refused while the driver renews its hold.
    """
    found = _find(run, storage)
    held = dead_leases(found)
    if not held:
        console.print(f"Nobody holds {found.run_id}: there is nothing to unlock.")
        return
    for _, what, holder in held:
        console.print(f"{escape(what)} is held by {escape(str(holder))}, {holder.last_seen}.", soft_wrap=True)
    if not yes:
        console.print(
            "If that process is only cut off from the storage, it stops as soon as it is back; what it did since "
            "is done again.",
            soft_wrap=True,
        )
        typer.confirm("Is it gone for good, and shall its hold be broken?", abort=True)
    for broken in unlock_run(found, _watched):
        console.print(f"Unlocked. {escape(broken)}.", soft_wrap=True)


def sync(run: RunArgument = None, storage: StorageOption = "runs") -> None:
    """Deliver to the trackers what a run could not deliver while they were away.

    Exit codes: 0 all of it is there, 75 a server is away (try again), 1 one refuses; the message has the remedy.
    """
    from pipelines.tracking.config import stored_targets

    found = _find(run, storage)
    codes = {_sync(found, target) for target in stored_targets(found.info().config, open_storage(storage))}
    for code in (EXIT_USER, EXIT_RESUMABLE):
        if code in codes:
            raise typer.Exit(code)


def _sync(run: Run, target: Target) -> int:
    """Deliver to one tracker and say what was done. Returns the exit code."""
    from pipelines.tracking import run_tracking

    with delivery_progress(console, f"Delivering to {target.where}") as on_progress:
        delivery = run_tracking.sync(run.storage, run.relpath, run.run_id, target, on_progress)
    for refused in delivery.refused:
        error_console.print(f"[yellow]left out:[/] {escape(refused)}", soft_wrap=True)
    if delivery.remaining:
        trouble = delivery.trouble
        why = escape(trouble.text) if trouble else "The run's journal is still being written."
        error_console.print(
            f"[bold red]error:[/] {run.run_id}: {_points(delivery.delivered)} delivered, {delivery.remaining:,} "
            f"remain. {why}",
            soft_wrap=True,
        )
        return EXIT_USER if trouble and trouble.cause is Cause.REFUSED else EXIT_RESUMABLE
    if delivery.trouble:  # all of it is there; only that could not be noted
        error_console.print(f"[yellow]note:[/] {escape(delivery.trouble.text)}", soft_wrap=True)
    done = f"{_points(delivery.delivered)} delivered; " if delivery.delivered else "nothing to deliver: "
    left_out = f" but {_points(len(delivery.refused))} that it does not take" if delivery.refused else ""
    console.print(f"{run.run_id}: {done}everything{left_out} is in {escape(target.where)}.", soft_wrap=True)
    return EXIT_USER if delivery.refused else 0


def _points(count: int) -> str:
    return f"{count:,} point{'' if count == 1 else 's'}"


def _summary(run: Run, stage: StageState) -> str | None:
    """A finished stage's summary of its result. The next run reports a damaged record, not this view."""
    kind = next((known for known in STAGES if known.kind == stage.kind), None)
    if stage.status != "SUCCEEDED" or stage.artifact is None or kind is None:
        return None
    artifact = ArtifactDir(run.storage, stage.artifact)
    try:
        record = read_record(artifact)
        return None if record is None else FinishedStage(artifact, record).result(kind).output.summary()
    except UserError:
        return None


def _find(run: str | None, storage: str) -> Run:
    return find_run(open_storage(storage), run)


def _styled(status: str) -> str:
    return f"[{STATUS_STYLES.get(status, 'white')}]{status}[/]"


def _watched(holder: LeaseInfo, wait_s: float) -> None:
    error_console.print(
        f"Watching for up to {wait_s:.0f} s whether {escape(str(holder.owner))} still works ({holder.last_seen}) ...",
        soft_wrap=True,
    )


def _shown_time(time: str | None) -> str:
    return (time or "")[:16].replace("T", " ")


def _elapsed(state: RunState | StageState) -> str:
    """How long it took; of what runs, how long it has been running."""
    finished_at = state.finished_at or (datetime.now(UTC).isoformat() if state.status == "RUNNING" else None)
    if not state.started_at or not finished_at:
        return ""
    seconds = (datetime.fromisoformat(finished_at) - datetime.fromisoformat(state.started_at)).total_seconds()
    text = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return text if state.finished_at else f"{text} so far"
