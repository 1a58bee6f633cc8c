"""Writes an exported model complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError
from pipelines.faults import explained_disk

if TYPE_CHECKING:
    from bmojo import BMojoLM
    from data.tokenizer import Tokenizer
    from pipelines.stages.export.config import ExportFormat


def check_target(directory: Path) -> None:
    """Raise UserError unless `directory` is new or empty."""
    try:
        _check_target(directory)
    except (OSError, ValueError) as error:  # too long, unreadable, or no path at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(directory)!r}: {reason}. Name another directory.") from error


def _check_target(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"{directory} is not a directory. Name a new one.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory} is not empty, and nothing is overwritten. Name a new directory, or remove it first."
        )


def export_model(model: BMojoLM, tokenizer: Tokenizer, directory: Path, to: ExportFormat) -> int:
    """Write a model and its tokenizer to `directory`, which appears only when all is written. Returns its bytes.

    Raises: UserError: the directory holds something, or cannot be written. InfrastructureError: its disk is full.
    """
    check_target(directory)
    directory = directory.absolute()
    with explained_disk(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            written = Path(scratch) / "model"
            _write(model, tokenizer, written, Path(scratch) / "tokenizer", to)
            num_bytes = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
            if directory.is_dir():
                directory.rmdir()
            os.replace(written, directory)
    return num_bytes


def _write(model: BMojoLM, tokenizer: Tokenizer, written: Path, scratch: Path, to: ExportFormat) -> None:
    from bmojo.hf import export_to_hf

    match to:
        case "hf":
            tokenizer.save(scratch)
            export_to_hf(model, scratch / "tokenizer.json", written)
            shutil.rmtree(scratch)
