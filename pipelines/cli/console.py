"""What the commands share: the console and common options."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

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
