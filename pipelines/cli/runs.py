"""`bmojo cancel`, `unlock`, `delete`, `sync`: what can be done to runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from base.errors import UserError
from pipelines.cli.console import (
    JsonOption,
    RunArgument,
    StorageOption,
    console,
    error_console,
    only_json_on_stdout,
    print_json,
    watched,
)
from pipelines.cli.progress import delivery_progress
from pipelines.engine.failures import EXIT_RESUMABLE, EXIT_USER
from pipelines.engine.runs import dead_leases, delete_run, find_run, unlock_run
from pipelines.storage import open_storage
from pipelines.tracking.trouble import Cause

if TYPE_CHECKING:
    from pipelines.engine.runs import Run
    from pipelines.tracking.sink import Target

RequiredRun = Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a pipeline's name.")]


def cancel(run: RequiredRun, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Ask the driver of a run to stop; what is finished is kept and the run can be resumed.

    Example: `bmojo cancel quickstart`
    """
    found = _find(run, storage)
    holder = found.request_cancel(watched)
    if as_json:
        print_json({"run": found.run_id, "driver": str(holder)})
        return
    console.print(f"Asked {escape(str(holder))} to stop {found.run_id}; it does so within seconds.")


def delete(
    run: RequiredRun,
    storage: StorageOption = "runs",
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Also delete its artifacts that no other run names.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a run's state and, with --artifacts, what it made. MLflow keeps its record of the run.

    Example: `bmojo delete quickstart --artifacts`
    """
    _require_yes(yes, as_json)
    found = _find(run, storage)
    holder = found.holder(watched)
    if holder is not None:
        raise UserError(f"Run {found.run_id} is running now, by {holder}. {found.remedy}")
    what = f"{found.run_id} and its artifacts" if artifacts else f"the state of {found.run_id} (its artifacts stay)"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    deleted = delete_run(found, artifacts, watched)
    if as_json:
        print_json({"run": found.run_id, "deleted": deleted})
        return
    for url in deleted:
        console.print(f"Deleted {escape(url)}")


def unlock(
    run: RequiredRun,
    storage: StorageOption = "runs",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Break the hold that a dead driver of another machine left on a run, and on the artifacts it was making.

    Not needed on the driver's own machine, where a dead process is seen. Refused while the driver renews its hold.

    Example: `bmojo unlock quickstart`
    """
    _require_yes(yes, as_json)
    found = _find(run, storage)
    held = dead_leases(found)
    if as_json:
        print_json({"run": found.run_id, "broken": unlock_run(found, watched)})
        return
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
    for broken in unlock_run(found, watched):
        console.print(f"Unlocked. {escape(broken)}.", soft_wrap=True)


def sync(run: RunArgument = None, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Deliver to the trackers what a run could not deliver while they were away.

    Exit codes: 0 all of it is there, 75 a server is away (try again), 1 one refuses; the message has the remedy.

    Example: `bmojo sync quickstart`
    """
    from pipelines.tracking.config import stored_targets

    if as_json:
        only_json_on_stdout()
    found = _find(run, storage)
    targets = stored_targets(found.info().config, open_storage(storage))
    codes = {target.name: _sync(found, target) for target in targets}
    if as_json:
        print_json({"run": found.run_id, "exit_codes": codes})
    for code in (EXIT_USER, EXIT_RESUMABLE):
        if code in codes.values():
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


def _require_yes(yes: bool, as_json: bool) -> None:
    if as_json and not yes:
        raise UserError("--json cannot ask: give --yes too.")


def _find(run: str | None, storage: str) -> Run:
    return find_run(open_storage(storage), run)
