"""`bmojo status`, `list`, `cancel`, `delete`, `sync`: looking after runs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli.console import RunArgument, StorageOption, console
from pipelines.cli.running import STATUS_STYLES

if TYPE_CHECKING:
    from pipelines.engine.runs import Run

RequiredRun = Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a pipeline's name.")]


def status(run: RunArgument = None, storage: StorageOption = "runs") -> None:
    """Show how far a run is, stage by stage."""
    found = _find(run, storage)
    state = found.state()
    console.print(f"[bold]{found.run_id}[/] {_styled(state.status)} {escape(found.url)}", soft_wrap=True)
    holder = found.holder()
    if holder is not None:
        console.print(f"  worked on by {escape(str(holder))}")
    table = Table("stage", "kind", "status", "time", "artifact", box=None, pad_edge=False)
    for name, stage in state.stages.items():
        shown = "[green]reused[/]" if stage.reused else _styled(stage.status)
        elapsed = _elapsed(stage.started_at, stage.finished_at)
        table.add_row(
            name, stage.kind, shown, elapsed, escape((stage.artifact or "").removeprefix(found.storage.url + "/"))
        )
    console.print(table)
    for name, stage in state.stages.items():
        if stage.error:
            console.print(f"[red]{name}:[/] {escape(stage.error)}", soft_wrap=True)
    if state.error and not any(stage.error for stage in state.stages.values()):
        console.print(f"[red]error:[/] {escape(state.error)}", soft_wrap=True)


def list_runs(storage: StorageOption = "runs") -> None:
    """List all runs of a storage, the latest last."""
    from pipelines.engine.runs import list_runs as all_runs
    from pipelines.engine.storage import Storage

    runs = all_runs(Storage(storage))
    if not runs:
        console.print(f"There are no runs in {escape(storage)}. Start one: bmojo run CONFIG.")
        return
    table = Table("run", "status", "stages", "started", "time", box=None, pad_edge=False)
    for run in runs:
        state = run.state()
        done = sum(stage.status == "SUCCEEDED" for stage in state.stages.values())
        started = (state.started_at or "")[:16].replace("T", " ")
        table.add_row(
            run.run_id,
            _styled(state.status),
            f"{done}/{len(state.stages)}",
            started,
            _elapsed(state.started_at, state.finished_at),
        )
    console.print(table)


def cancel(run: RequiredRun, storage: StorageOption = "runs") -> None:
    """Ask the driver of a run to stop; what is finished is kept and the run can be carried on with."""
    found = _find(run, storage)
    holder = found.request_cancel()
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
    from pipelines.engine.runs import delete_run

    found = _find(run, storage)
    what = f"{found.run_id} and its artifacts" if artifacts else f"the state of {found.run_id} (its artifacts stay)"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    for url in delete_run(found, with_artifacts=artifacts):
        console.print(f"Deleted {escape(url)}")


def sync(run: RunArgument = None, storage: StorageOption = "runs") -> None:
    """Deliver to MLflow what a run could not deliver while the tracking server was away."""
    from pipelines.engine.storage import Storage
    from pipelines.tracking import run_tracking
    from pipelines.tracking.target import resolve_target

    found = _find(run, storage)
    tracking = found.info().config["tracking"]
    target = resolve_target(tracking["uri"], tracking["experiment"], Storage(storage))
    with console.status(f"Delivering to {escape(target.shown_uri)} ..."):
        remaining = run_tracking.sync(found.storage, found.relpath, found.run_id, target)
    if remaining:
        console.print(f"{remaining} points are still not delivered: is {escape(target.shown_uri)} up?")
        raise typer.Exit(75)
    console.print(f"{found.run_id}: everything is in MLflow at {escape(target.shown_uri)}.")


def _find(run: str | None, storage: str) -> Run:
    from pipelines.engine.runs import find_run
    from pipelines.engine.storage import Storage

    return find_run(Storage(storage), run)


def _styled(status: str) -> str:
    return f"[{STATUS_STYLES.get(status, 'white')}]{status}[/]"


def _elapsed(started_at: str | None, finished_at: str | None) -> str:
    if not started_at or not finished_at:
        return ""
    seconds = (datetime.fromisoformat(finished_at) - datetime.fromisoformat(started_at)).total_seconds()
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
