"""The `bmojo` command. Each module beside this one holds a few commands; this one puts them together."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from base.cache import cache_dir
from pipelines.cli import (
    chat,
    checkpoints,
    data,
    environment,
    export,
    garbage,
    inspect,
    memory,
    models,
    presets,
    reports,
    results,
    running,
    runs,
    serve,
    submit,
    watching,
)
from pipelines.cli.console import OverridableCommand, console, error_console, escape_unprintable
from pipelines.engine.failures import EXIT_BUG, EXIT_CANCELLED, Failure, classify
from pipelines.engine.interrupts import exit_after_signal, handle_signals
from pipelines.faults import explained_disk
from pipelines.tracking.environment import quiet_environment

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
    "Run pipelines": {"plan": running.plan, "run": running.run, "submit": submit.submit, "resume": running.resume},
    "Look after runs": {
        "list": watching.list_runs,
        "status": watching.status,
        "logs": watching.logs,
        "checkpoints": checkpoints.checkpoints,
        "output": results.output,
        "metadata": results.metadata,
        "why": results.why,
        "diff": results.diff,
        "compare": reports.compare,
        "open": reports.open_report,
        "cancel": runs.cancel,
        "unlock": runs.unlock,
        "delete": runs.delete,
        "sync": runs.sync,
        "gc": garbage.gc,
    },
    "Look at data": {"lineage": data.lineage},
    "Use a trained model": {
        "generate": models.generate,
        "chat": chat.chat,
        "serve": serve.serve,
        "remember": memory.remember,
        "ask": memory.ask,
        "inspect": inspect.inspect,
        "export": export.export,
    },
    "Environment": {"ui": environment.ui, "doctor": environment.doctor, "schema": environment.schema},
    "Compare architectures": {"models": presets.models},
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name=name, rich_help_panel=panel, cls=OverridableCommand)(command)
app.add_typer(data.app, name="data", rich_help_panel="Look at data")
app.add_typer(memory.app, name="store", rich_help_panel="Use a trained model")


def _show_version(wanted: bool) -> None:
    if wanted:
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
    """Run the command, and turn whatever it raises into one screen and an exit code (pipelines.errors)."""
    handle_signals()
    quiet_environment()
    escape_unprintable()
    try:
        with explained_disk():
            try:
                app()
            except BrokenPipeError:  # `bmojo list | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
    except SystemExit:  # how every command ends, also by SIGTERM
        exit_after_signal()
        raise
    except BaseException as error:
        failure = classify(error)
        _say(failure)
        exit_after_signal()
        sys.exit(failure.exit_code)


def _say(failure: Failure) -> None:
    """One screen on standard error; a bug's traceback goes to a file that the screen names."""
    if failure.exit_code == EXIT_CANCELLED:
        error_console.print("Interrupted. The same command resumes from what is finished.")
        return
    error_console.print(f"[bold red]error:[/] {escape(failure.text)}", soft_wrap=True)
    if failure.exit_code == EXIT_BUG and failure.details:
        error_console.print(
            f"This is a bug in bmojo, not in your input. The traceback is in {escape(_save(failure.details))}; please "
            "report it with that file.",
            soft_wrap=True,
        )


def _save(traceback: str) -> str:
    """Keep a traceback in the user's state directory, or the temporary one. Returns the file's path."""
    state = os.environ.get("XDG_STATE_HOME")
    homes = [Path(state) / "bmojo" if state else cache_dir(), Path(tempfile.gettempdir())]
    for home in homes:
        try:
            folder = home / "errors"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{os.getpid()}.txt"
            file.write_text(traceback, encoding="utf-8")
            return str(file)
        except OSError:
            continue
    return f"this text, because no directory can be written:\n{traceback}"
