"""What the commands share: the console and common options."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

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
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FIELD=VALUE]...", help="Override any field: train.lr=1e-3, tracking.experiment=mine."),
]
