"""`bmojo checkpoints` on what training really saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from base.errors import UserError
from pipelines.cli.checkpoints import checkpoints
from pipelines.stages.train.layout import MANIFEST
from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline

app = typer.Typer()
app.command("checkpoints")(checkpoints)
Finishing = tuple[TinyPipeline, Finished]


def said(pipeline: TinyPipeline, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--storage", str(pipeline.storage)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@contextmanager
def put_back(folder: Path) -> Iterator[None]:
    """Other tests look at the same run."""
    copy = folder.parent.parent / "copy"
    shutil.copytree(folder, copy)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        shutil.move(copy, folder)


def test_kept_checkpoints_are_listed_and_verified(finished_pipeline: Finishing) -> None:
    pipeline, _ = finished_pipeline
    rows = json.loads(said(pipeline, "tiny", "--json"))
    assert [(row["stage"], row["step"], row["condition"]) for row in rows] == [
        ("train", 12, "complete"), ("train", 16, "complete"),
    ]  # fmt: skip
    folder = Path(rows[1]["url"])
    on_disk = sum(file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST)
    assert rows[1]["size_bytes"] == on_disk
    assert rows[1]["num_tokens"] == pipeline.record("train")["output"]["tokens_seen"]
    assert rows[1]["num_workers"] == 2
    verified = json.loads(said(pipeline, "train", "--verify", "--json"))
    assert [row["condition"] for row in verified] == ["verified", "verified"]
    assert "12" in said(pipeline)


def test_a_byte_that_changed_is_found_and_named(finished_pipeline: Finishing) -> None:
    pipeline, _ = finished_pipeline
    folder = pipeline.artifact("train") / "checkpoints" / "step-00000016"
    file = next(folder.glob("tensors-00001-*"))
    with put_back(folder):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "damaged" not in said(pipeline), "only --verify reads the bytes"
        with pytest.raises(UserError, match=f"{file.name} has other bytes") as raised:
            said(pipeline, "--verify")
        assert "resumes from the newest one that is whole" in str(raised.value)
        (folder / MANIFEST).unlink()
        assert "incomplete" in said(pipeline, "--verify")


def test_only_train_stages_have_checkpoints(finished_pipeline: Finishing) -> None:
    pipeline, _ = finished_pipeline
    with pytest.raises(UserError, match=r"expected a train stage\. This run's: train"):
        said(pipeline, "tiny", "tokens")
