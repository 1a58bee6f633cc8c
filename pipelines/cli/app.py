"""The `bmojo` command. Each module beside this one holds a few commands; this one puts them together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pipelines.cli import environment, export, inspect, models, running, runs
from pipelines.cli.console import OverridableCommand, console, error_console, escape_unprintable
from pipelines.errors import UserError

app = typer.Typer(
    name="bmojo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Pretrain B'MOJO language models: text -> shards -> training -> evaluation -> report, as durable Ray "
    "workflows."
    "\n\nStart with `bmojo doctor`, then `bmojo plan configs/quickstart.yaml` and `bmojo run configs/quickstart.yaml`.",
)
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Run pipelines": {"plan": running.plan, "run": running.run, "resume": running.resume},
    "Look after runs": {
        "status": runs.status,
        "list": runs.list_runs,
        "cancel": runs.cancel,
        "unlock": runs.unlock,
        "delete": runs.delete,
        "sync": runs.sync,
    },
    "Use a trained model": {"generate": models.generate, "inspect": inspect.inspect, "export": export.export},
    "Environment": {"ui": environment.ui, "doctor": environment.doctor, "schema": environment.schema},
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name=name, rich_help_panel=panel, cls=OverridableCommand)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        console.print(f"bmojo {importlib.metadata.version('bmojo-pipeline')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options of `bmojo` itself."""


def main() -> None:
    """Entry point: a UserError becomes one screen and exit code 1; Ctrl-C becomes 130."""
    from pipelines.tracking.environment import quiet_environment

    quiet_environment()
    escape_unprintable()
    try:
        app()
    except UserError as error:
        error_console.print(f"[bold red]error:[/] {_escaped(error)}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        error_console.print("Interrupted. The same command carries on from what is finished.")
        sys.exit(130)
    except BrokenPipeError:  # `bmojo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _escaped(error: UserError) -> str:
    from rich.markup import escape

    return escape(str(error))
