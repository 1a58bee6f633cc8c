"""`bmojo compare` and `bmojo open`: pages about finished evaluations."""

from __future__ import annotations

import os
import re
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import JsonOption, RunAndStageArgument, StorageOption, console
from pipelines.engine.events import Status
from pipelines.engine.runs import Run
from pipelines.stages.report.stage import ReportStage
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from pipelines.stages.report.page import Report
    from pipelines.stages.report.tables import Grid, TableCell

_LONGEST_NAME = 80


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs: ids, the beginnings of some, pipelines' names; of other storages by folder or URL.",
        ),
    ],
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate stages, or the train stages they evaluate; left out: all that are finished."),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="Model that the others are compared with, as the table names it; left out: the first.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write, or an .html file; left out: compare-RUN-RUN here."),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Compare finished evaluations of any runs: figures with intervals and differences to a baseline, curves, data.

    Prints the table and writes the page that a `report` stage would write. Measures nothing again.

    Example: `bmojo compare quickstart-1a2b quickstart-3c4d --output page`
    """
    from pipelines.api.comparison import compare as compare_runs
    from pipelines.api.finding import find_run_anywhere

    opened = open_storage(storage)
    found = [find_run_anywhere(opened, word) for word in runs]
    report = compare_runs(found, stage or (), baseline, title)
    page = _write(report, output or Path(_folder_name(found)))
    if as_json:
        sys.stdout.write(report.json)
        return
    console.print(_table(report.results))
    for sentence in report.verdicts:
        console.print(sentence, soft_wrap=True, markup=False)
    console.print(f"Wrote {page}.", soft_wrap=True, markup=False)


def open_report(words: RunAndStageArgument = None, storage: StorageOption = "runs") -> None:
    """Open a run's report in the browser; without a display, print where it is.

    One in an object store is fetched first.

    Example: `bmojo open quickstart`
    """
    from pipelines.api.finding import find_stage

    run, stage = find_stage(open_storage(storage), words or ())
    page = _report_of(run, stage)
    console.print(str(page), soft_wrap=True, markup=False)
    if _has_display():
        webbrowser.open(page.as_uri())


def _report_of(run: Run, stage: str | None) -> Path:
    """The page on this machine. Raises UserError: there is none, or there are several."""
    states = run.state().stages
    reports = {name: state for name, state in states.items() if state.kind == ReportStage.kind}
    if stage is not None and stage not in reports:
        raise UserError(f"Stage {stage} of run {run.run_id} is no report. Reports: {', '.join(reports) or 'none'}.")
    wanted = {name: state for name, state in reports.items() if stage in (None, name)}
    done = {name: state for name, state in wanted.items() if state.status is Status.SUCCEEDED}
    if not done:
        how = ", ".join(f"{name} is {state.status}" for name, state in wanted.items()) or "it has no report stage"
        raise UserError(
            f"Run {run.run_id} has no finished report: {how}. For a page about its evaluations: bmojo compare "
            f"{run.run_id}"
        )
    if len(done) > 1:
        raise UserError(f"Run {run.run_id} has several reports. Name one: bmojo open {run.run_id} {next(iter(done))}")
    (state,) = done.values()
    artifact = run.artifact_of(state)
    if artifact is None or not artifact.exists("report.html"):
        raise UserError(f"The report of run {run.run_id} was deleted; run the pipeline again to have it made.")
    return artifact.fetch("report.html")


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _write(report: Report, target: Path) -> Path:
    """The page that was written. Raises UserError: it cannot be."""
    try:
        if target.suffix == ".html":
            target.write_text(report.html, encoding="utf-8")
            return target
        report.write(target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}. Name a folder that can be written with --output.") from error
    return target / "report.html"


def _folder_name(runs: list[Run]) -> str:
    names = "-".join(dict.fromkeys(run.run_id for run in runs))
    return f"compare-{re.sub(r'[^A-Za-z0-9._-]', '-', names)}"[:_LONGEST_NAME]


def _table(grid: Grid) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(grid.columns):
        table.add_column(_cell(column), justify="right" if number else "left")
    for row in grid.rows:
        table.add_row(*(_cell(cell) for cell in row))
    for row in grid.faint:
        table.add_row(*(f"[dim]{escape(cell.text)}[/]" for cell in row))
    return table


def _cell(cell: TableCell) -> str:
    text = f"[bold green]{escape(cell.text)}[/]" if cell.mark == "best" else escape(cell.text)
    mark = f" [dim]{escape(cell.mark)}[/]" if cell.mark and cell.mark != "best" else ""
    small = f"\n[dim]{escape(cell.small)}[/]" if cell.small else ""
    return f"{text}{mark}{small}"
