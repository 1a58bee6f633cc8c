"""`bmojo data show`, `data stats`, `data verify`, and `bmojo lineage`: what models are trained on."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from base.errors import DamagedError, UserError
from pipelines.cli.console import JsonOption, OverridableCommand, StorageOption, console, error_console, print_json
from pipelines.engine.runs import Run
from pipelines.storage import open_storage
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from pipelines.api.finding import RunAndStage
    from pipelines.api.tokens import LengthBin, ShownSample

TokenizeArgument = Annotated[
    list[str],
    typer.Argument(metavar="[RUN] STAGE", help="A tokenize stage of a run; of the latest run, if that is left out."),
]
_BAR = 40
_TOKEN_STYLES = ("", "on grey23")  # neighbours differ

app = typer.Typer(
    no_args_is_help=True, help="Look at the tokens that models are trained on.", rich_markup_mode="markdown"
)


def show(
    words: TokenizeArgument,
    sample: Annotated[int, typer.Option(min=0, help="Number of the first sequence in the split.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 1,
    split: Annotated[Literal["train", "valid"], typer.Option(help="Which split.")] = "train",
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Show sequences as text: every token by its background, every document by its name and place in its file.

    Example: `bmojo data show quickstart tokens --sample 7`
    """
    from pipelines.api.tokens import show_samples

    shown = list(show_samples(_artifact(storage, words), split, range(sample, sample + count)))
    if as_json:
        print_json(shown)
        return
    for each in shown:
        _print_sample(each)


def stats(words: TokenizeArgument, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Show what the splits hold: documents, tokens, padding, shards, and how long documents are.

    Example: `bmojo data stats quickstart tokens`
    """
    from pipelines.api.tokens import statistics

    found = list(statistics(_artifact(storage, words)))
    if as_json:
        print_json(found)
        return
    for each in found:
        console.print(f"[bold]{each.split}[/]")
        console.print(
            f"  {each.num_documents:,} documents, {each.num_tokens:,} tokens, {each.num_bytes:,} bytes of text "
            f"({each.bytes_per_token:.2f} per token)\n"
            f"  {each.num_samples:,} sequences, {each.padded_share:.2%} padding, {each.cut_share:.1%} of the documents "
            f"in more than one\n  {each.num_shards:,} shards, {each.shard_bytes:,} bytes",
            soft_wrap=True,
        )
        lengths = ", ".join(f"{name}: {length:,}" for name, length in each.document_tokens.items())
        console.print(f"  tokens per document: {lengths}", soft_wrap=True)
        _print_lengths(each.lengths)


def filters(
    words: TokenizeArgument,
    count: Annotated[int, typer.Option(min=1, help="How many documents to show.")] = 20,
    reason: Annotated[
        str | None, typer.Option(help="Only those left out for this reason, such as too_short or near_duplicate.")
    ] = None,
    kept: Annotated[bool, typer.Option("--kept", help="Those that are kept, instead of those left out.")] = False,
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Show which documents the stage's filters leave out, by which filter and why. Reads the source again.

    Example: `bmojo data filters quickstart tokens --reason too_short`
    """
    from pipelines.api.verdicts import verdicts

    found = _stage_of(storage, words)
    wanted = (one for one in verdicts(*found) if one.kept == kept and reason in (None, one.reason))
    shown = list(islice(wanted, count))
    if as_json:
        print_json(shown)
        return
    for one in shown:
        why = "" if one.kept else f": {one.reason} by {one.filter}: {escape(one.why or '')}"
        console.print(f"[bold blue]{escape(one.document)}[/]{why}", soft_wrap=True)
        console.print(
            f"  {' '.join(one.text.split())}", markup=False, highlight=False, overflow="ellipsis", no_wrap=True
        )
    if not shown:
        console.print("No such document.")


def verify(words: TokenizeArgument, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Read every shard and compare it with its digest. Exit code 1 if one is damaged.

    Example: `bmojo data verify quickstart tokens`
    """
    from pipelines.api.tokens import VerifyReport, num_files, verify

    artifact = _artifact(storage, words)
    problems, num_bytes, num_checked = [], 0, 0
    columns = TextColumn("comparing digests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=error_console, transient=True) as progress:
        bar = progress.add_task("", total=num_files(artifact))
        for checked in verify(artifact):
            progress.advance(bar)
            num_checked, num_bytes = num_checked + 1, num_bytes + checked.num_bytes
            if checked.problem is not None:
                problems.append(checked.problem)
    if as_json:
        print_json(VerifyReport(num_files=num_checked, num_bytes=num_bytes, problems=tuple(problems)))
    for problem in problems:
        error_console.print(f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise DamagedError(f"{len(problems)} of {num_checked} files are not as they were written. {artifact.remedy}")
    if not as_json:
        console.print(f"All {num_checked} files ({num_bytes:,} bytes of shards) are as they were written.")


def lineage(
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, as the curves count: from 1.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN] [STAGE]", help="A train stage; left out, the only one of the run."),
    ] = None,
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Name what a step was trained on: each sequence's shard, and the files, bytes and documents it is made of.

    Example: `bmojo lineage quickstart train --step 120`
    """
    from pipelines.api.lineage import lineage as lineage_of

    found = _found(storage, words or [])
    traced = lineage_of(found.run, found.stage or _only_training(found), step)
    if as_json:
        print_json(traced)
        return
    console.print(f"[bold]{traced.stage}[/] of {traced.run}, step {traced.step}: {len(traced.samples)} sequences")
    for sample in traced.samples:
        console.print(
            f"[bold]{escape(sample.source)}[/] sequence {sample.sample}: {sample.shard}, number {sample.in_shard}",
            soft_wrap=True,
        )
        for part in sample.documents:
            console.print(
                f"  {escape(part.document)}{_bytes(part.first_byte, part.end_byte)}: {part.num_tokens} tokens from "
                f"{part.first_token} on",
                soft_wrap=True,
            )


for _command in (show, stats, filters, verify):
    app.command(cls=OverridableCommand)(_command)


def _artifact(storage: str, words: list[str]) -> ArtifactDir:
    from pipelines.api.tokens import tokens_artifact

    return tokens_artifact(*_stage_of(storage, words))


def _stage_of(storage: str, words: list[str]) -> tuple[Run, str]:
    found = _found(storage, words)
    if found.stage is None:
        names = ", ".join(found.run.info().fingerprints)
        raise UserError(f"{words[0]!r} is a run. Name its tokenize stage too; its stages: {names}.")
    return found.run, found.stage


def _found(storage: str, words: list[str]) -> RunAndStage:
    from pipelines.api.finding import find_stage

    return find_stage(open_storage(storage), words)


def _only_training(found: RunAndStage) -> str:
    names = [name for name, stage in found.run.stored_state().stages.items() if stage.kind == "train"]
    if len(names) != 1:
        raise UserError(f"Run {found.run.run_id} has {len(names)} train stages: {', '.join(names)}. Name one.")
    return names[0]


def _print_sample(sample: ShownSample) -> None:
    padded = f", {sample.num_padded} tokens of padding" if sample.num_padded else ""
    console.print(
        f"[bold]{sample.split} sequence {sample.sample}[/]: {sample.shard}, number {sample.in_shard}{padded}",
        soft_wrap=True,
    )
    for piece in sample.pieces:
        begun = f", from its token {piece.first_token} on" if piece.first_token else ""
        console.print(
            f"[bold blue]{escape(piece.document)}[/]{_bytes(piece.first_byte, piece.end_byte)}: {piece.num_tokens} of "
            f"{piece.document_tokens + 1} tokens{begun}",
            soft_wrap=True,
        )
        for number, token in enumerate(piece.tokens):
            console.print(token, style=_TOKEN_STYLES[number % 2], markup=False, highlight=False, end="", soft_wrap=True)
        console.print()


def _print_lengths(lengths: tuple[LengthBin, ...]) -> None:
    most = max(each.num_documents for each in lengths)
    for each in lengths:
        bar = "█" * round(_BAR * each.num_documents / most) or ("▏" if each.num_documents else "")
        console.print(f"  {each.at_least:>10,} to {each.less_than - 1:>10,} {bar:<{_BAR}} {each.num_documents:,}")


def _bytes(first: int | None, end: int | None) -> str:
    return "" if first is None or end is None else f" (bytes {first:,} to {end:,})"
