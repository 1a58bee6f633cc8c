"""`bmojo submit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape

from base.errors import UserError
from pipelines.cli.console import OverridesArgument, console, error_console
from pipelines.cli.running import ConfigArgument
from pipelines.engine.failures import EXIT_CANCELLED
from pipelines.redact import redact
from pipelines.storage import LocalStorage, open_storage
from pipelines.submit.dashboard import connect, dashboard_address, is_on_this_machine
from pipelines.submit.environment import choose
from pipelines.submit.job import Job, Request, StartedRun
from pipelines.submit.package import choose_files
from pipelines.submit.paths import common_base, find_inputs, find_storage

_SHOWN_LEFT_OUT = 5


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
    ] = 10,
) -> None:
    """Run a pipeline as a job of a Ray cluster; this terminal may be closed.

    Ships this program, the folder of the pipeline file, and the files that it names by relative paths.

    Exit codes: 0 submitted, 1 your input or configuration is wrong, 75 the cluster does not answer. With --follow, or
    if the job ends before its run begins: that of the run.
    """
    from pipelines.loading import load_pipeline

    if as_json and follow:
        raise typer.BadParameter("--json and --follow exclude each other")
    given = list(overrides or ())
    _refuse_secrets(given)
    loaded = load_pipeline(config, given)
    variables = choose(env or ())
    url = dashboard_address(address)
    folder = (working_dir or config.parent).resolve()
    if not folder.is_dir():
        raise UserError(f"--working-dir {working_dir}: no such folder.")
    client = connect(url)
    is_here = is_on_this_machine(url)
    storage, storage_note = find_storage(loaded.storage, is_here)
    inputs = find_inputs(loaded.graph(), is_here)
    if storage != loaded.storage:
        given.append(f"storage={storage}")
    if loaded.cluster.address not in ("local", "auto"):
        given.append("cluster.address=auto")
    opened = open_storage(storage)
    config_file = config.absolute()
    contents = choose_files(
        folder, [config_file, *inputs.shipped], Path(opened.url) if isinstance(opened, LocalStorage) else None
    )
    for note in filter(None, (storage_note, *inputs.notes, _note_left_out(folder, contents.left_out))):
        error_console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    request = Request(
        name=loaded.name,
        config=config_file,
        overrides=given,
        restarts=restarts,
        contents=contents,
        base=common_base([Path.cwd(), *(file.parent for file in contents.files)]),
        variables=variables,
    )
    job = Job.submit(client, url, request)
    console_of_text = error_console if as_json else console
    try:
        with error_console.status(f"Submitted job {job.job_id}. Waiting for its run to begin ..."):
            run = job.wait_for_run(loaded.name)
            code = job.exit_code() if run is None else None
        if as_json:
            found = {"job_id": job.job_id, "address": url, "run_id": run and run.run_id, "storage": run and run.storage}
            print(json.dumps(found))
        if code is None or not follow:
            for line in _instructions(job, run, url, storage):
                console_of_text.print(line, soft_wrap=True, markup=False)
        if follow:
            code = job.follow(_write)
        elif code is not None:
            error_console.print(job.output().rstrip(), soft_wrap=True, markup=False)
    except KeyboardInterrupt:
        error_console.print(
            f"Not followed any more. Job {job.job_id} goes on; to stop it: ray job stop {job.job_id} --address {url}",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(EXIT_CANCELLED) from None
    if code is not None:
        if code:
            error_console.print(f"Job {job.job_id} ended. {job.message()}", soft_wrap=True, markup=False)
        raise typer.Exit(code)


def _instructions(job: Job, run: StartedRun | None, url: str, storage: str) -> list[str]:
    name = run.run_id if run is not None else "RUN"
    at = f"{name} --storage {quote(run.storage if run is not None else str(redact(storage)))}"
    what = f"run {run.run_id}" if run is not None else "its run has not begun yet"
    return [
        f"Job {job.job_id} at {url}: {what}. This terminal may be closed.",
        f"  watch   bmojo status {at} --watch",
        f"  follow  bmojo logs {at} --follow",
        f"  cancel  bmojo cancel {at}",
        f"  output  ray job logs {job.job_id} --address {url}",
    ]


def _note_left_out(folder: Path, left_out: tuple[str, ...]) -> str | None:
    if not left_out:
        return None
    more = f" and {len(left_out) - _SHOWN_LEFT_OUT} more" if len(left_out) > _SHOWN_LEFT_OUT else ""
    return f"not shipped of {folder}: {', '.join(left_out[:_SHOWN_LEFT_OUT])}{more}."


def _refuse_secrets(overrides: list[str]) -> None:
    """Ray shows the command of a job to everyone who may list jobs."""
    for override in overrides:
        name, _, value = override.partition("=")
        field = name.rpartition(".")[2]
        if redact({field: value}) != {field: value}:
            raise UserError(
                f"override {name}=...: its value looks like a secret, and Ray shows the command of a job. Write it "
                "into the pipeline file, or ship a variable with --env."
            )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
