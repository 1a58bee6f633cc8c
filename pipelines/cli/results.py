"""`bmojo output`, `metadata`, `why`, `diff`: what came out of runs, how, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import (
    JsonOption,
    RunAndStageArgument,
    StorageOption,
    console,
    print_json,
    styled,
    watched,
)
from pipelines.engine.fingerprint import flatten
from pipelines.engine.runs import find_run
from pipelines.storage import open_storage


def output(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[RUN] STAGE", help="The stage of a run; of the latest run, if that is left out."),
    ],
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Show the result of a finished stage, and where its files are.

    Example: `bmojo output quickstart train --json`
    """
    from pipelines.api.finding import find_stage
    from pipelines.api.results import stage_output

    found = find_stage(open_storage(storage), words)
    if found.stage is None:
        names = ", ".join(found.run.info().fingerprints)
        raise UserError(f"{words[0]!r} is a run. Name one of its stages too: {names}.")
    result = stage_output(found.run, found.stage)
    if as_json:
        print_json(result)
        return
    console.print(f"[bold]{result.stage}[/] of {result.run} ({result.kind}), made {result.created_at}", soft_wrap=True)
    console.print(f"  files: {escape(result.artifact)}", soft_wrap=True)
    _print_fields(result.output)


def metadata(words: RunAndStageArgument = None, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Show what is known of a run or a stage: settings, fingerprint, versions, commit, hardware, attempts, times.

    Example: `bmojo metadata quickstart train`
    """
    from pipelines.api.finding import find_stage
    from pipelines.api.results import run_metadata, stage_metadata

    found = find_stage(open_storage(storage), words or ())
    if found.stage is None:
        known = run_metadata(found.run, watched)
        if as_json:
            print_json(known)
            return
        console.print(f"[bold]{known.run}[/] {styled(known.status)} {escape(known.url)}", soft_wrap=True)
        _print_fields(known.model_dump(mode="json", exclude={"run", "status", "url", "stages"}))
        for stage in known.stages:
            seconds = "" if stage.duration_s is None else f", {stage.duration_s:.1f} s"
            attempts = f"{len(stage.attempts)} attempt{'' if len(stage.attempts) == 1 else 's'}"
            console.print(f"  {stage.stage} ({stage.kind}) {styled(stage.status)}: {attempts}{seconds}", soft_wrap=True)
        console.print(f"More of a stage: bmojo metadata {known.run} STAGE")
        return
    of_stage = stage_metadata(found.run, found.stage, watched)
    if as_json:
        print_json(of_stage)
        return
    console.print(f"[bold]{of_stage.stage}[/] of {of_stage.run} {styled(of_stage.status)}", soft_wrap=True)
    _print_fields(of_stage.model_dump(mode="json", exclude={"run", "stage", "status", "attempts", "parts"}))
    for attempt in of_stage.attempts:
        how = f"{attempt.outcome or 'not known to have ended'}{f': {attempt.error}' if attempt.error else ''}"
        console.print(
            f"  attempt {attempt.number}: {attempt.started_at} to {attempt.ended_at or '?'}, process {attempt.pid} on "
            f"{escape(attempt.host)}: {escape(how)}",
            soft_wrap=True,
        )


def why(words: RunAndStageArgument = None, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Say why a run or a stage is as it is: what it waits for, what changed so that it runs, why it ended so.

    Before a run, `bmojo plan CONFIG` says why each stage would be reused or run.

    Example: `bmojo why quickstart train`
    """
    from pipelines.api.finding import find_stage
    from pipelines.api.reasons import why as reasons_of

    found = find_stage(open_storage(storage), words or ())
    reasons = reasons_of(found.run, found.stage, watched)
    if as_json:
        print_json(reasons)
        return
    console.print(f"[bold]{reasons.run}[/] {styled(reasons.status)}", soft_wrap=True)
    for sentence in reasons.sentences:
        console.print(f"  {escape(sentence)}", soft_wrap=True)
    for stage in reasons.stages:
        console.print(f"[bold]{stage.stage}[/] {styled(stage.status)}")
        for sentence in stage.sentences:
            console.print(f"  {escape(sentence)}", soft_wrap=True)


def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run: its id, or a pipeline's name.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare with it.")],
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Compare two runs: the settings that differ, and the final figures side by side.

    Example: `bmojo diff quickstart-1a2b quickstart-3c4d`
    """
    from pipelines.api.difference import diff as compare

    opened = open_storage(storage)
    difference = compare(find_run(opened, first), find_run(opened, second))
    if as_json:
        print_json(difference)
        return
    table = Table("setting", difference.first, difference.second, box=None, pad_edge=False)
    for field in difference.config:
        missing = (field.only_in == difference.second, field.only_in == difference.first)
        cells = (
            "-" if gone else _shown(value) for gone, value in zip(missing, (field.first, field.second), strict=True)
        )
        table.add_row(field.field, *map(escape, cells))
    console.print(table if difference.config else "No setting differs.")
    figures = Table("figure", difference.first, difference.second, "difference", "", box=None, pad_edge=False)
    for figure in difference.figures:
        relative = "" if figure.relative is None else f"{figure.relative:+.2%}"
        figures.add_row(
            figure.figure, *(_number(value) for value in (figure.first, figure.second)),
            "" if figure.difference is None else f"{figure.difference:+.6g}", relative,
        )  # fmt: skip
    console.print()
    console.print(figures if difference.figures else "Neither run has final figures yet.")


def _print_fields(fields: dict[str, Any]) -> None:
    for name, value in flatten(fields).items():
        console.print(f"  {escape(name)}: {escape(_shown(value))}", soft_wrap=True)


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
