"""What the commands share: the console, JSON, and common options."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pipelines.engine.lease import LeaseInfo

STATUS_STYLES = {
    "SUCCEEDED": "green", "FAILED": "red", "DAMAGED": "red", "RESUMABLE": "yellow", "CANCELLED": "yellow",
    "STOPPED": "yellow",    "RUNNING": "cyan", "QUEUED": "blue",
}  # fmt: skip
console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


class OverridableCommand(TyperCommand):
    """A command that tells `--train.lr=1e-3` from an option: overrides have no dashes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, after a look at what cannot be an option."""
        options = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        for arg in args[: args.index("--")] if "--" in args else args:
            name, equals, _ = arg.partition("=")
            if arg.startswith("--") and equals and name not in options:
                raise typer.BadParameter(f"no such option: {name}. Overrides have no dashes: {arg.lstrip('-')}", ctx)
        return super().parse_args(ctx, args)


def escape_unprintable() -> None:
    """Show characters that the terminal's encoding lacks (LC_ALL=C) as escapes, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def styled(status: str) -> str:
    """A status in its colour."""
    return f"[{STATUS_STYLES.get(status, 'white')}]{status}[/]"


def watched(holder: LeaseInfo, wait_s: float) -> None:
    """Say that a driver of another machine is watched for a while (pipelines.engine.lease.Watch)."""
    error_console.print(
        f"Watching for up to {wait_s:.0f} s whether {escape(str(holder.owner))} still works ({holder.last_seen}) ...",
        soft_wrap=True,
    )


def print_json(value: BaseModel | Sequence[BaseModel] | Mapping[str, Any]) -> None:
    """One JSON value on standard output. Numbers that JSON lacks are the strings NaN, Infinity and -Infinity."""
    if isinstance(value, BaseModel):
        plain = json.loads(value.model_dump_json())
    elif isinstance(value, Mapping):
        plain = dict(value)
    else:
        plain = [json.loads(item.model_dump_json()) for item in value]
    sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: BaseModel) -> None:
    """One JSON object on a line of standard output."""
    sys.stdout.write(value.model_dump_json() + "\n")
    sys.stdout.flush()


def only_json_on_stdout() -> None:
    """Show everything else on standard error from now on."""
    console.file = sys.stderr


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else on standard output; the guide has its fields.")
]
StorageOption = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="BMOJO_STORAGE",
        help="Where runs are kept: a path or URL, as `storage` in the pipeline file.",
    ),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="Run id, the beginning of one, or a pipeline's name; left out: the latest run."
    ),
]
RunAndStageArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [STAGE]",
        help="A run as above, and one of its stages. One word is a run, or else a stage of the latest run.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FIELD=VALUE]...", help="Override any field: train.lr=1e-3, tracking.experiment=mine."),
]
