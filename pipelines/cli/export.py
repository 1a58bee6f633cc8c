"""`bmojo export`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.console import StorageOption, console
from pipelines.cli.models import StageOption, load_trained
from pipelines.stages.export.config import ExportFormat
from pipelines.stages.export.directory import check_target, export_model


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a pipeline's name.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to write: new or empty.")],
    to: Annotated[ExportFormat, typer.Option(help="Format: `hf` is a Hugging Face model directory.")] = "hf",
    stage: StageOption = None,
    storage: StorageOption = "runs",
) -> None:
    """Write a trained model for use in other programs: `bmojo export RUN --to hf DIR`.

    The directory needs no installation of this package: AutoModelForCausalLM.from_pretrained(DIR,
    trust_remote_code=True) loads it, and so does lm-eval's `hf` model type.
    """
    check_target(directory)
    with console.status("Exporting ..."):
        trained = load_trained(storage, run, stage)
        num_bytes = export_model(trained.model, trained.tokenizer, directory, to)
    console.print(
        f"Wrote stage {trained.stage} of {trained.run.run_id} to {directory} ({num_bytes / 1e6:.1f} MB). Load it:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)",
        soft_wrap=True,
        markup=False,
    )
