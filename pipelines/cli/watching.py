"""`bmojo list`, `status`, `logs`: how far runs are, and what they print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from base.errors import UserError
from pipelines.cli.console import (
    JsonOption,
    RunAndStageArgument,
    RunArgument,
    StorageOption,
    console,
    error_console,
    only_json_on_stdout,
    print_json,
    print_json_line,
    styled,
    watched,
)
from pipelines.engine.failures import EXIT_CANCELLED
from pipelines.engine.runs import find_run
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from pipelines.api import RunRow, RunStatus, StageStatus


def list_runs(
    storage: StorageOption = "runs",
    status: Annotated[
        list[str] | None,
        typer.Option("--status", "-s", help="Only runs with this status, such as running; give it again for more."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Only runs of this pipeline.")] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", help="Only runs that worked since: a time (2026-11-27T10:00, UTC) or an age (12h, 7d)."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a storage, the latest last.

    Example: `bmojo list --status running --status resumable --since 7d`
    """
    from pipelines.api.listing import DAMAGED, checked_statuses, parsed_since
    from pipelines.api.listing import list_runs as listed

    statuses, start = checked_statuses(status or ()), parsed_since(since) if since else None
    rows = listed(open_storage(storage), statuses, name, start, watched)
    if as_json:
        print_json(rows)
        return
    if not rows:
        filtered = " that the filters let through" if statuses or name or start else ""
        console.print(f"There are no runs{filtered} in {escape(storage)}. Start one: bmojo run CONFIG.")
        return
    table = Table("run", "status", "stages", "started", "time", box=None, pad_edge=False)
    for row in rows:
        if row.status == DAMAGED:
            table.add_row(row.run, "[red]damaged[/]", "", "", "")
            continue
        done = f"{row.stages_done}/{row.stages_total}"
        table.add_row(row.run, styled(row.status), done, _shown_time(row.started_at), _time(row))
    console.print(table)
    for row in rows:
        if row.status == DAMAGED:
            error_console.print(f"[red]{row.run}:[/] {escape(row.error or '')}", soft_wrap=True)


def status(
    run: RunArgument = None,
    storage: StorageOption = "runs",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it until the run ends; exit with the run's exit code.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a run is: its stages, steps, newest figures, time left, what they wait for, and errors.

    With --watch and --json: an object per line, whenever something has changed. Ctrl-C stops watching, not the run.

    Example: `bmojo status quickstart --watch`
    """
    from pipelines.api.run_status import status as status_of
    from pipelines.api.run_status import watch as watch_run

    found = find_run(open_storage(storage), run)
    if not watch:
        current = status_of(found, watched)
        if as_json:
            print_json(current)
        else:
            console.print(_page(current), soft_wrap=True)
        return
    if as_json:
        only_json_on_stdout()
    try:
        last = _show_all(watch_run(found, watched), as_json)
    except KeyboardInterrupt:
        error_console.print("Stopped watching; the run goes on.")
        raise typer.Exit(EXIT_CANCELLED) from None
    raise typer.Exit(last.exit_code or 0)


def logs(
    words: RunAndStageArgument = None,
    storage: StorageOption = "runs",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the stage or the run has ended, through its attempts.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Which attempt at the stage; left out: the last one.", show_default=False)
    ] = None,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help="Only so many lines at the end of each log.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a stage and its workers printed; without STAGE every stage, its name before each line.

    With --json: an object per line. A run in an object store is 20 s behind, except on its driver's machine.

    Example: `bmojo logs quickstart train --follow --lines 20`
    """
    from pipelines.api.finding import find_stage
    from pipelines.api.log_lines import logs as log_lines

    found = find_stage(open_storage(storage), words or ())
    if attempt is not None and found.stage is None:
        raise UserError("--attempt is of one stage: name it, as in `bmojo logs RUN STAGE --attempt 1`.")
    last_attempt = attempt
    try:
        for line in log_lines(found.run, found.stage, attempt, lines, follow, watched):
            if as_json:
                print_json_line(line)
                continue
            if found.stage is not None and last_attempt not in (None, line.attempt):
                error_console.print(f"[dim]{line.stage}: attempt {line.attempt}[/]")
            last_attempt = line.attempt
            shown = line.line if found.stage is not None else f"{line.stage} | {line.line}"
            console.print(Text(shown), soft_wrap=True)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_CANCELLED) from None


def _show_all(statuses: Iterator[RunStatus], as_json: bool) -> RunStatus:
    """Show each as it comes. Returns the last."""
    if as_json or not console.is_terminal:
        return _tell_changes(statuses, as_json)
    current: RunStatus | None = None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for current in statuses:
            live.update(_page(current), refresh=True)
    assert current is not None
    console.print(_page(current), soft_wrap=True)
    return current


def _tell_changes(statuses: Iterator[RunStatus], as_json: bool) -> RunStatus:
    current: RunStatus | None = None
    told: dict[str, str] = {}
    before: RunStatus | None = None
    for current in statuses:
        if as_json:
            if before is None or before.without_clocks() != current.without_clocks():
                print_json_line(current)
            before = current
            continue
        for stage in current.stages:
            line = f"{stage.name}: {' '.join(_news(stage))}"
            if told.get(stage.name) != line:
                told[stage.name] = line
                console.print(f"{time.strftime('%H:%M:%S')} {escape(line)}", soft_wrap=True)
    assert current is not None
    if not as_json:
        error = f": {current.error}" if current.error else ""
        console.print(f"{time.strftime('%H:%M:%S')} {current.run} {current.status}{escape(error)}", soft_wrap=True)
    return current


def _news(stage: StageStatus) -> list[str]:
    """What a line about the stage says: nothing that time alone changes."""
    words = ["reused" if stage.reused else str(stage.status)]
    if stage.attempt > 1:
        words.append(f"attempt {stage.attempt}")
    if stage.status == "RUNNING" and stage.done is not None:
        words += [_progress(stage), *stage.shown_values()]
    if stage.note:
        words.append(f"({stage.note})")
    if stage.waits_for:
        words.append(f"({stage.waits_for})")
    if stage.error and stage.status != "RUNNING":
        words.append(f"- {stage.error}")
    return words


def _page(current: RunStatus) -> Group:
    """The whole picture."""
    head = [f"[bold]{current.run}[/] {styled(current.status)} {escape(current.url)}"]
    if current.driver:
        head.append(f"  running now, by {escape(current.driver)}")
    if current.started_at:
        ended = f", ended {_shown_time(current.finished_at)}" if current.finished_at else ""
        head.append(f"  started {_shown_time(current.started_at)}{ended}")
    if current.checked_at:
        head.append(f"  checked again at {_shown_time(current.checked_at)}: all of it was still there")
    head += [f"  {escape(tracker)}: {escape(where)}" for tracker, where in current.links.items()]
    table = Table("stage", "kind", "status", "attempt", "progress", "left", "started", "time", box=None, pad_edge=False)
    for stage in current.stages:
        table.add_row(
            stage.name,
            stage.kind,
            "[green]reused[/]" if stage.reused else styled(stage.status),
            str(stage.attempt or ""),
            escape("  ".join([_progress(stage), *(stage.shown_values() if stage.status == "RUNNING" else ())])),
            _duration(stage.eta_s) if stage.eta_s is not None else "",
            _shown_time(stage.started_at),
            _time(stage),
        )
    return Group(*map(_line, head), table, *map(_line, _details(current)))


def _details(current: RunStatus) -> Iterator[str]:
    """Lines below the table."""
    for stage in current.stages:
        if stage.waits_for:
            yield f"{stage.name}: {escape(stage.waits_for)}"
        if stage.note:
            yield f"{stage.name}: {escape(stage.note)}"
        if stage.summary:
            yield f"{stage.name}: {escape(stage.summary)}"
        if stage.gate:
            yield f"[yellow]{stage.name}:[/] gate closed: {escape(stage.gate)}"
        if stage.artifact and stage.status == "SUCCEEDED":
            yield f"  [dim]{escape(stage.artifact)}[/]"
        if stage.error:
            yield f"[red]{stage.name}:[/] {escape(stage.error)}"
        if stage.log and (stage.error or stage.status == "RUNNING"):
            yield f"  [dim]{escape(stage.log)}[/]"
    if current.error and not any(stage.error for stage in current.stages):
        yield f"[red]error:[/] {escape(current.error)}"
    if current.resume:
        yield f"Resume: {escape(current.resume)}"


def _line(markup: str) -> Text:
    return Text.from_markup(markup, overflow="fold")


def _progress(stage: StageStatus) -> str:
    if stage.done is None:
        return ""
    return f"{stage.done:,} of {stage.total:,}" if stage.total else f"{stage.done:,}"


def _shown_time(time_text: str | None) -> str:
    """In UTC, to the minute."""
    return datetime.fromisoformat(time_text).strftime("%Y-%m-%d %H:%M") if time_text else ""


def _time(shown: RunRow | StageStatus) -> str:
    """How long it took; of what runs, how long it has been running."""
    if shown.time_s is None:
        return ""
    return _duration(shown.time_s) if shown.finished_at else f"{_duration(shown.time_s)} so far"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
