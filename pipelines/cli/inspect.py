"""`bmojo inspect`: what a trained model keeps in memory while it reads a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from base.errors import UserError
from pipelines.cli.console import StorageOption, console, error_console
from pipelines.cli.models import StageOption, load_trained

HTML, PNG = "inspection.html", "inspection.png"


def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a pipeline's name.")],
    text: Annotated[Path, typer.Option(help="UTF-8 file to read.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; left out: inspect-RUN-FILE here.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Read at most this many tokens of the file.")] = 4096,
    threshold: Annotated[
        float | None, typer.Option(min=0, help="Score above which the rule `threshold` keeps a token; left out: 1.")
    ] = None,
    mlflow: Annotated[bool, typer.Option(help="Show the result with the run in MLflow, too.")] = True,
    stage: StageOption = None,
    storage: StorageOption = "runs",
) -> None:
    """Draw which tokens of a text each layer kept, how surprising each was, and where attention went; and which tokens
    other selection rules would keep.

    Writes inspection.html and inspection.png.
    """
    content = read_text(text)
    from pipelines.inspection.draw import draw_inspection
    from pipelines.inspection.publish import publish_inspection

    with console.status("Reading the text ..."):
        trained = load_trained(storage, run, stage)
        drawn = draw_inspection(
            trained.model, trained.tokenizer, content, max_tokens, f"What {trained.run.run_id} keeps of {text.name}",
            f"Stage {trained.stage} of run {trained.run.run_id}; layers {trained.model.config.pattern}.",
            threshold,
        )  # fmt: skip
    folder = output or Path(f"inspect-{trained.run.run_id}-{text.stem}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HTML).write_text(drawn.html, encoding="utf-8")
        (folder / PNG).write_bytes(drawn.png)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Name a folder that can be written with --output.") from error
    for line in drawn.summary:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Wrote {folder / HTML} and {folder / PNG}.", soft_wrap=True, markup=False)
    if mlflow:
        problem = publish_inspection(trained.run, [folder / HTML, folder / PNG], f"inspect-{text.stem}")
        if problem:
            error_console.print(f"[yellow]warning:[/] not shown in MLflow: {escape(problem)}", soft_wrap=True)


def read_text(file: Path) -> str:
    """The file's text. Raises UserError: it is missing, empty, or not UTF-8."""
    try:
        content = file.read_bytes().decode()
    except OSError as error:
        raise UserError(f"--text {file}: {error.strerror}. Name a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {file}: byte {error.start} is not UTF-8. Convert the file to UTF-8 first.") from error
    if not content.strip():
        raise UserError(f"--text {file}: the file holds no text. Name one with some paragraphs.")
    return content
