"""`bmojo doctor`, `bmojo schema`, `bmojo ui`: the environment around runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import StorageOption, console
from pipelines.storage import open_storage

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


def doctor(
    storage: StorageOption = "runs",
    neuron: Annotated[
        bool, typer.Option("--neuron", help="Walk through the first hour on an AWS Trainium instance instead.")
    ] = False,
) -> None:
    """Check the environment: versions, compiler, devices, disk, memory, shared memory.

    Exits with 1 when something a run cannot do without is missing.
    """
    from pipelines.doctor import run_checks
    from pipelines.neuron_doctor import run_first_hour

    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    worst_is_error = False
    with console.status("Looking at the environment ..."):
        for check in run_first_hour() if neuron else run_checks(storage):
            worst_is_error |= check.verdict == "error"
            table.add_row(check.name, MARKS[check.verdict], check.found, check.advice)
    console.print(table)
    if worst_is_error:
        raise typer.Exit(1)


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; left out: standard output.")
    ] = None,
) -> None:
    """Write the JSON schema of pipeline files, for completion and checks in editors.

    First line of a pipeline file for the YAML language server: # yaml-language-server: $schema=pipeline.schema.json
    """
    from pipelines.loading import pipeline_schema

    text = json.dumps(pipeline_schema(), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}. Name a file that can be written with --output.") from error
        console.print(f"Wrote {output}.")


def ui(
    storage: StorageOption = "runs",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to bind. Anything but loopback shows your runs to the network.")
    ] = "127.0.0.1",
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Names that browsers may call the server by, with commas between them, * for all; left out: this "
            "machine's names."
        ),
    ] = None,
) -> None:
    """Open MLflow's UI on the storage's tracking store (Ctrl-C stops it)."""
    from pipelines.tracking.config import default_targets
    from pipelines.tracking.mlflow.server import serve
    from pipelines.tracking.mlflow.target import MlflowConfig

    viewers = {target.name: target.viewer() for target in default_targets(open_storage(storage))}
    for name, command in viewers.items():
        if command:
            console.print(f"{name}: {escape(command)}", soft_wrap=True)
    target = MlflowConfig().target(open_storage(storage))
    if target.artifact_root is None:
        console.print(f"Tracking is at {target.shown_uri} (MLFLOW_TRACKING_URI): open it there.")
        return
    if not target.has_store():
        if any(viewers.values()):
            return
        raise UserError(
            f"{target.uri}: no tracking store there yet. Run a pipeline first, or name its storage with --storage."
        )
    with console.status("Starting MLflow's server ...") as waiting:

        def announce() -> None:
            waiting.stop()
            shown = f"[{host}]" if ":" in host else host
            console.print(f"MLflow UI on http://{escape(shown)}:{port} (Ctrl-C stops it)", soft_wrap=True)
            console.print('Choose "Model training" at the top left there: that page lists the runs and compares them.')

        try:
            serve(target, host, port, allowed_hosts, announce)
        except KeyboardInterrupt:
            return
