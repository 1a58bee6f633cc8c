"""`bmojo plan`, `bmojo run`, `bmojo resume`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import (
    STATUS_STYLES,
    JsonOption,
    OverridesArgument,
    RunArgument,
    StorageOption,
    console,
    error_console,
    only_json_on_stdout,
    print_json,
    styled,
    watched,
)
from pipelines.cli.progress import StageProgress, progress_display, source_progress
from pipelines.engine.observer import Observer
from pipelines.engine.runs import find_run
from pipelines.engine.stage import Machines, tells_progress
from pipelines.storage import open_storage
from pipelines.supervisor import ProgressPipe, supervise

if TYPE_CHECKING:
    from rich.progress import Progress

    from pipelines.config import PipelineConfig
    from pipelines.engine.plan import PlannedStage
    from pipelines.engine.results import RunResult
    from pipelines.engine.runs import Run
    from pipelines.engine.stage import AnyNode
    from pipelines.engine.state import StageState

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)]


HardwareOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Plan training for workers on this GPU: h100, h200, a100, b200, mi300x, ..."),
]
PriceOption = Annotated[
    float | None,
    typer.Option(min=0, metavar="AMOUNT", help="Price of one worker's device for an hour: adds the cost of training."),
]
MeasureOption = Annotated[
    bool, typer.Option("--measure", help="Take real training steps on this machine first, and keep what they took.")
]


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    hardware: HardwareOption = None,
    price: PriceOption = None,
    measure: MeasureOption = False,
) -> None:
    """Show what `run` would do: stages to reuse, resume or run and why; memory, disk, FLOPs, time and cost of training.

    Changes nothing. Memory is worked out from the model itself, part by part, and compared with what there is: this
    machine's, or that of --hardware. Time is what was measured here for the same settings (--measure, or `bmojo run
    --dry`), else a share of the peak; the plan says which.

    Example: `bmojo plan configs/quickstart.yaml --hardware h100 --price 2.5 train.micro_batch_size=8`
    """
    from pipelines.loading import load_pipeline
    from pipelines.preflight import cores_of
    from pipelines.session import open_pipeline

    loaded = load_pipeline(config, overrides or ())
    pipeline = open_pipeline(loaded, config, is_for_here=hardware is None)
    table = Table("stage", "kind", "action", "why", box=None, pad_edge=False)
    with progress_display(console) as progress, source_progress(progress, console):
        planned = pipeline.plan()
    running = pipeline.holders(planned, watched)
    for stage in planned:
        if stage.name in running:
            action, reasons = "running", [f"running now, by {running[stage.name]}"]
        else:
            action, reasons = str(stage.action), [stage.reason, *stage.changes]
        table.add_row(stage.name, stage.kind, action, escape("\n".join(reasons)))
    console.print(table)
    machines = Machines(cores_of(loaded.cluster), hardware, price, measure)
    _print_estimates(pipeline.graph, machines)
    for node in pipeline.graph:
        node.stage.check_memory(node, machines)


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Start the scheduler again, up to this many times without progress, if it is killed or exits with 75.",
        ),
    ] = 0,
    as_json: JsonOption = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only take two steps of each training, and compare them with its plan.")
    ] = False,
) -> None:
    """Run or resume a pipeline: finished stages are reused, interrupted ones resumed.

    Exit codes: 0 done, 1 your input or configuration is wrong, 70 a bug, 75 cluster, storage or disk failed or SIGTERM
    came (the same command resumes), 130 cancelled. With --json: at the end, what `bmojo status --json` prints.

    With --dry nothing is written into the storage: the workers of each training start as configured, take two steps
    more than it needs to warm up, and step time, tokens per second and peak memory are shown beside the plan.

    Example: `bmojo run configs/quickstart.yaml train.lr=1e-3`
    """
    from pipelines.loading import load_pipeline
    from pipelines.session import run_config

    if as_json:
        only_json_on_stdout()
    supervisor = supervise(restarts, _say_of_supervisor) if restarts else ProgressPipe()
    loaded = load_pipeline(config, overrides or ())
    if dry:
        _run_dry(loaded)
        return
    _drive(lambda observer: run_config(loaded, str(config), observer, overrides=overrides or ()), as_json, supervisor)


def _run_dry(config: PipelineConfig) -> None:
    """Say of each training what two steps took, beside its plan."""
    from pipelines.api.dry_run import dry_run
    from pipelines.preflight import cores_of

    rows = [report.row() for report in dry_run(config, Machines(cores_of(config.cluster)))]
    if not rows:
        raise UserError("--dry takes steps of train stages, and this pipeline has none.")
    table = Table(*rows[0].keys(), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print("Nothing was written into the storage. Times are kept: `bmojo plan` uses them.", style="dim")


def _say_of_supervisor(text: str) -> None:
    error_console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


def resume(
    run: RunArgument = None,
    storage: StorageOption = "runs",
    every: Annotated[
        bool, typer.Option("--all", help="Resume every RESUMABLE run of the storage, one after the other.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Resume a run as it was configured, without its pipeline file, from any directory.

    Relative paths start where they did when the run was started. --all leaves runs alone that a driver works on; its
    exit code is the worst one: 70, 1, 130, 75, 3, else 0.

    Example: `bmojo resume quickstart`, or `bmojo resume --all --storage s3://bucket/runs`
    """
    from pipelines.api.resuming import resume as resume_run

    if as_json:
        only_json_on_stdout()
    if not every:
        found = find_run(open_storage(storage), run)
        _drive(lambda observer: resume_run(found, observer), as_json)
    elif run is not None:
        raise UserError(f"Found the run {run} and --all, expected one of the two.")
    else:
        _resume_all(storage, as_json)


def _resume_all(storage: str, as_json: bool) -> None:
    from pipelines.api.resuming import resume_all, worst_exit_code

    with progress_display(console) as progress, source_progress(progress, console):
        resumed = resume_all(open_storage(storage), lambda run: ConsoleObserver(progress, ProgressPipe()), watched)
    if as_json:
        print_json(resumed)
    elif not resumed:
        console.print(f"No run in {escape(storage)} is RESUMABLE.")
    else:
        for one in resumed:
            error = f" {one.error}" if one.error else ""
            console.print(f"{one.run}: {styled(one.status)}{escape(error)}", soft_wrap=True)
    raise typer.Exit(worst_exit_code(resumed))


def _drive(work: Callable[[Observer], RunResult], as_json: bool, supervisor: ProgressPipe | None = None) -> None:
    """Run something and show it. The exit code is that of the run."""
    with progress_display(console) as progress, source_progress(progress, console):
        result = work(ConsoleObserver(progress, supervisor or ProgressPipe()))
    if as_json:
        from pipelines.api.run_status import status

        print_json(status(result.run))
    if result.failure is not None:
        raise typer.Exit(result.failure.exit_code)


class ConsoleObserver(Observer):
    """Draws a run on the console, and tells the supervisor how far it is."""

    def __init__(self, progress: Progress | None, supervisor: ProgressPipe) -> None:
        self._progress, self._supervisor = progress, supervisor
        self._stages: dict[str, StageProgress] = {}
        self._started_at = time.monotonic()
        self._stage_started_at: dict[str, float] = {}

    def on_run_start(self, run: Run, plan: Sequence[PlannedStage]) -> None:
        """Name the run."""
        console.print(f"[bold]{run.run_id}[/] in {escape(run.storage.url)}", soft_wrap=True)

    def on_stage_queued(self, stage: PlannedStage, reason: str) -> None:
        """Say what we wait for."""
        console.print(f"  {stage.name}: {escape(reason)}", soft_wrap=True)

    def on_stage_start(self, stage: PlannedStage) -> None:
        """Open the stage's bar."""
        again = stage.name in self._stages
        if again:
            self._stages[stage.name].close()
        self._stage_started_at.setdefault(stage.name, time.monotonic())
        self._stages[stage.name] = StageProgress(self._progress, console, stage.name, stage.node.stage.progress)
        console.print(f"  {stage.name}: {'resuming' if again or stage.action == 'resume' else 'running'} ...")

    def on_metrics(self, stage: PlannedStage, step: int, values: Mapping[str, float]) -> None:
        """Move the bar."""
        if not tells_progress(values):
            return
        self._supervisor.tell(stage.name, step)
        bar = self._stages.get(stage.name)
        if bar is not None:
            bar.update(step, values)

    def on_stage_end(self, stage: PlannedStage, state: StageState) -> None:
        """Close the bar and say how it went."""
        bar = self._stages.pop(stage.name, None)
        if bar is not None:
            bar.close()
        if state.reused:
            console.print(f"  {stage.name}: [green]reused[/] {escape(state.artifact or '')}")
        elif state.status == "SUCCEEDED":
            self._supervisor.tell(stage.name, ProgressPipe.FINISHED)
            elapsed_s = time.monotonic() - self._stage_started_at.get(stage.name, self._started_at)
            console.print(f"  {stage.name}: [green]done[/] in {elapsed_s:.0f} s")
        else:
            console.print(f"  {stage.name}: [{STATUS_STYLES.get(state.status, 'red')}]{state.status}[/]")

    def on_notice(self, text: str) -> None:
        """A line of its own."""
        console.print(f"  [yellow]note:[/] {escape(text)}", soft_wrap=True)

    def on_run_end(self, result: RunResult) -> None:
        """The figures and where the report is; or what went wrong and what to do."""
        style = STATUS_STYLES.get(result.status, "red")
        console.print(f"[{style}]{result.status}[/] in {time.monotonic() - self._started_at:.0f} s")
        for backlog in result.undelivered:
            why = escape(backlog.trouble.text) if backlog.trouble else f"{backlog.sink} is slow to take them."
            console.print(
                f"  [yellow]note:[/] {backlog.events:,} points are not in {backlog.sink} yet: {why} "
                f"Deliver them: bmojo sync {result.run.run_id} --storage {escape(quote(result.run.storage.url))}",
                soft_wrap=True,
            )
        failures = {f"stage {name}: ": failure for name, failure in result.failures.items()}
        if result.failure is not None and result.failure not in failures.values():
            failures[""] = result.failure
        for where, failure in failures.items():
            error_console.print(f"[bold red]error:[/] {escape(where + failure.text)}", soft_wrap=True)
        if result.failure is not None:
            kept = [f"{result.run.url}/logs/"] if result.failures else []
            if any(failure.details for failure in failures.values()):
                kept.append(f"{result.run.url}/errors/ (tracebacks)")
            if kept:
                error_console.print(f"What the stages printed is in {escape(', '.join(kept))}.", soft_wrap=True)
            if result.status == "STOPPED":
                error_console.print("What is finished is kept. With another gate, the same command goes on from there.")
            elif result.status != "FAILED":
                error_console.print("The same command resumes from what is finished.")
            return
        for node in result.stages.values():
            if headline := node.stage.headline(node.config, node.output, node.artifact):
                console.print(f"  {node.name}: {headline}", soft_wrap=True)


def _print_estimates(graph: Sequence[AnyNode], machines: Machines) -> None:
    """The estimates of each kind of stage."""
    for stage in dict.fromkeys(node.stage for node in graph):
        for estimate in stage.estimate([node for node in graph if node.stage is stage], machines):
            table = Table(*estimate.columns, box=None, pad_edge=False)
            for row in estimate.rows:
                table.add_row(*row)
            console.print()
            console.print(table)
            for note in estimate.notes:
                console.print(note, style="dim")
