"""`bmojo submit`."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.cli.console import (
    JsonOption,
    OverridesArgument,
    console,
    error_console,
    only_json_on_stdout,
    print_json,
)
from pipelines.cli.running import ConfigArgument
from pipelines.engine.failures import EXIT_CANCELLED
from pipelines.submit.job import RESTARTS, Job, StartedRun


def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="URL of the cluster's dashboard; left out: RAY_ADDRESS, or http://127.0.0.1:8265.", show_default=False
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the job's output until it ends.")] = False,
    as_json: JsonOption = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME", help="Ship this variable, with its value here; also 'AWS_*'. Repeatable."
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Folder to ship; left out: that of the pipeline file.", show_default=False),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of a scheduler that was killed or exits with 75, without progress.")
    ] = RESTARTS,
) -> None:
    """Run a pipeline as a job of a Ray cluster; this terminal may be closed.

    Ships this program, the folder of the pipeline file, and the files that it names by relative paths.

    Exit codes: 0 submitted, 1 your input or configuration is wrong, 75 the cluster does not answer. With --follow, or
    if the job ends before its run begins: that of the run.
    """
    from pipelines.submit.submission import submit as submit_pipeline

    if as_json and follow:
        raise typer.BadParameter("--json and --follow exclude each other")
    if as_json:
        only_json_on_stdout()
    job = submit_pipeline(config, overrides or (), address, env or (), working_dir, restarts, _note)
    try:
        with error_console.status(f"Submitted job {job.job_id}. Waiting for its run to begin ..."):
            run = job.wait_for_run()
            code = job.exit_code() if run is None else None
        if as_json:
            found = {"run": run and run.run_id, "storage": run and run.storage}
            print_json({"job": job.job_id, "address": job.url, **found})
        if code is None or not follow:
            for line in _instructions(job, run):
                console.print(line, soft_wrap=True, markup=False)
        if follow:
            code = job.follow(_write)
        elif code is not None:
            error_console.print(job.output().rstrip(), soft_wrap=True, markup=False)
    except KeyboardInterrupt:
        error_console.print(
            f"Not followed any more. Job {job.job_id} goes on. To stop it: ray job stop {job.job_id} "
            f"--address {job.url}",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(EXIT_CANCELLED) from None
    if code is not None:
        if code:
            error_console.print(f"Job {job.job_id} ended. {job.message()}", soft_wrap=True, markup=False)
        raise typer.Exit(code)


def _instructions(job: Job, run: StartedRun | None) -> list[str]:
    at = f"{run.run_id} --storage {quote(run.storage)}" if run is not None else "RUN --storage STORAGE"
    what = f"run {run.run_id}" if run is not None else "its run has not begun yet"
    return [
        f"Job {job.job_id} at {job.url}: {what}. This terminal may be closed.",
        f"  watch   bmojo status {at} --watch",
        f"  follow  bmojo logs {at} --follow",
        f"  cancel  bmojo cancel {at}",
        f"  output  ray job logs {job.job_id} --address {job.url}",
    ]


def _note(text: str) -> None:
    error_console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
