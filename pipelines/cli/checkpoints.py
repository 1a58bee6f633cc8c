"""`bmojo checkpoints`: what training has saved."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import JsonOption, RunAndStageArgument, StorageOption, console, print_json, watched
from pipelines.storage import open_storage

_COLOURS = {"verified": "green", "complete": "white", "damaged": "red", "incomplete": "yellow"}


def checkpoints(
    words: RunAndStageArgument = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every file and compare it with its digest; exit code 1 if one differs."),
    ] = False,
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints that training has kept, and check them.

    Which are kept: `keep_checkpoints` and `keep_every_steps` of the train stage.

    Example: `bmojo checkpoints quickstart --verify`
    """
    from pipelines.api.checkpoints import checkpoints as checkpoints_of
    from pipelines.api.finding import find_stage

    found = find_stage(open_storage(storage), words or ())
    with console.status("Reading every file ..." if verify else "Looking ..."):
        rows = list(checkpoints_of(found.run, found.stage, verify, watched))
    damaged = [row for row in rows if row.condition == "damaged"]
    if as_json:
        print_json(rows)
    elif not rows:
        console.print(f"Run {found.run.run_id} has no checkpoint yet.")
    else:
        table = Table("stage", "step", "tokens", "train loss", "MB", "condition", box=None, pad_edge=False)
        for row in rows:
            known = (
                ("-", "-", "-")
                if row.size_bytes is None
                else (f"{row.num_tokens:,}", f"{row.train_loss:.4f}", f"{row.size_bytes / 1e6:,.1f}")
            )
            colour = _COLOURS[row.condition]
            table.add_row(escape(row.stage), f"{row.step:,}", *known, f"[{colour}]{row.condition}[/]")
        console.print(table)
    if damaged:
        raise UserError(
            " ".join(f"{row.problem}." for row in damaged)
            + " Training resumes from the newest one that is whole. Restore what is damaged, or delete its folder."
        )
