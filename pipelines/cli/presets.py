"""`bmojo models`: the presets side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli.console import JsonOption, console, print_json


def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PRESET]...", help="Presets; all of configs/models if left out.")
    ] = None,
    seq_len: Annotated[
        int, typer.Option(min=1, help="Tokens read: the state of full attention grows with them.")
    ] = 2048,
    vocab_size: Annotated[int, typer.Option(min=1, help="Token ids, which the embedding has rows for.")] = 50_304,
    as_json: JsonOption = False,
) -> None:
    """Show parameters, decoding state and FLOPs of the model presets, to see which comparisons are equal in what.

    Example: `bmojo models mamba2-130m kda-130m --seq-len 4096`
    """
    from pipelines.api.presets import list_presets

    rows = list_presets(names or (), seq_len, vocab_size)
    if as_json:
        print_json(rows)
        return
    table = Table("preset", "parameters", "state", "FLOPs", "pattern", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.preset,
            f"{row.num_params / 1e6:,.1f} M",
            f"{row.state_bytes / 1e6:,.2f} MB",
            f"{row.forward_flops_per_token / 1e6:,.0f} M",
            escape(row.pattern),
        )
    console.print(table, soft_wrap=True)
    console.print(
        f"State: float32, one sequence, after {seq_len:,} tokens. FLOPs: forward, per token. "
        f"Vocabulary: {vocab_size:,}."
    )
