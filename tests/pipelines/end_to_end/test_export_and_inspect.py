"""`bmojo export` and `bmojo inspect` on a model that was really trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from base.errors import UserError
from bmojo.checkpoint_io import load_pretrained
from bmojo.hf import import_from_hf
from pipelines.cli.export import export
from pipelines.cli.inspect import inspect
from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline

app = typer.Typer()
app.command("export")(export)
app.command("inspect")(inspect)


def test_the_trained_model_can_be_exported(finished_pipeline: tuple[TinyPipeline, Finished], tmp_path: Path):
    pipeline, _ = finished_pipeline
    arguments = ["export", "tiny", "--to", "hf", str(tmp_path / "hf"), "--storage", str(pipeline.storage)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    trained = load_pretrained(pipeline.artifact("train") / "model")
    back = import_from_hf(tmp_path / "hf")
    assert back.config == trained.config
    assert all((back.state_dict()[name] == value).all() for name, value in trained.state_dict().items())
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError)  # nothing is overwritten


@pytest.mark.ci
def test_the_trained_model_can_be_inspected(finished_pipeline: tuple[TinyPipeline, Finished], tmp_path: Path):
    pipeline, _ = finished_pipeline
    text = tmp_path / "document.txt"
    first = (pipeline.folder / "corpus.jsonl").read_text().splitlines()[0]
    text.write_text(json.loads(first)["text"])
    result = CliRunner().invoke(
        app,
        ["inspect", "tiny", "--text", str(text), "--output", str(tmp_path / "out"), "--storage", str(pipeline.storage)],
    )
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    assert (tmp_path / "out" / "inspection.html").read_text().count('<div class="strip">') == 2


def test_a_run_that_does_not_exist_is_named(tmp_path: Path):
    result = CliRunner().invoke(app, ["export", "nothing", str(tmp_path / "hf"), "--storage", str(tmp_path / "runs")])
    assert isinstance(result.exception, UserError)
    assert "no runs" in str(result.exception)
