"""`bmojo export` and the `export` stage."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from pydantic import ValidationError
from typer.testing import CliRunner

from base.errors import UserError
from bmojo.hf import import_from_hf
from pipelines.cli.export import export
from pipelines.engine.stage import StageContext, StageNode, StageResult
from pipelines.errors import FieldError, InfrastructureError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import EvaluateInputs, EvaluateStage
from pipelines.stages.export.config import ExportStageConfig
from pipelines.stages.export.directory import export_model
from pipelines.stages.export.stage import ExportInputs, ExportStage
from pipelines.stages.train.stage import TrainStage
from pipelines.storage import open_storage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal, read_events
from tests.pipelines.stages.evaluate.here import trained_on
from tests.pipelines.stages.train.training import write_tokens
from tests.pipelines.stages.trained_run import tiny_model, tiny_tokenizer, trained_model

app = typer.Typer()
app.command()(export)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = trained_model(tmp_path)
    monkeypatch.setattr("pipelines.cli.export.load_trained", lambda storage, run, stage: found)
    return found


def test_command_writes_a_model_that_comes_back_the_same(trained, tmp_path):
    target = tmp_path / "deep" / "out"
    result = CliRunner().invoke(app, ["tiny", "--to", "hf", str(target)])
    assert result.exit_code == 0, result.output
    assert "trust_remote_code=True" in result.output
    back = import_from_hf(target)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert [path.name for path in target.parent.iterdir()] == ["out"]  # no scratch is left
    assert (target / "tokenizer.json").is_file()


def test_a_directory_that_holds_something_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.cli.export.load_trained", lambda *_: pytest.fail("loaded"))
    (tmp_path / "mine.txt").write_text("keep")
    result = CliRunner().invoke(app, ["tiny", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "not empty" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="not a directory"):
        export_model(tiny_model("swa"), tiny_tokenizer(), tmp_path / "mine.txt", "hf")


@pytest.mark.parametrize(("path", "message"), [("x" * 300, "File name too long"), ("a" * 5000, "File name too long")])
def test_paths_that_cannot_be_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, path, message):
    monkeypatch.setattr("pipelines.cli.export.load_trained", lambda *_: pytest.fail("loaded"))
    result = CliRunner().invoke(app, ["tiny", str(tmp_path / path)])
    assert isinstance(result.exception, UserError)
    assert f"{message}. Name another directory." in str(result.exception)


def test_an_empty_directory_may_be_named(tmp_path):
    (tmp_path / "out").mkdir()
    assert export_model(tiny_model("swa"), tiny_tokenizer(), tmp_path / "out", "hf") > 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, InfrastructureError), (errno.EIO, InfrastructureError), (errno.EROFS, UserError)],
)
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, number, error):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "model.safetensors")

    monkeypatch.setattr("bmojo.hf.exporting.save_tensors", fail)
    with pytest.raises(error, match=f"model.safetensors: {os.strerror(number)}"):
        export_model(tiny_model("swa"), tiny_tokenizer(), tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("register_as", [None, "tiny-model"])
def test_stage_exports_the_train_stage_it_needs(tmp_path, monkeypatch, register_as):
    found = trained_model(tmp_path)
    monkeypatch.setattr(
        "pipelines.stages.export.stage.run_tasks", lambda function, calls, resources: [function(*calls[0])]
    )
    output = SimpleNamespace(model="model", tokenizer=str(tmp_path / "tokens" / "tokenizer"))
    finished: Any = StageResult("f" * 64, ArtifactDir.at(tmp_path / "train"), output)  # type: ignore[type-var]  # two fields are read
    train: Any = StageNode("train", TrainStage(), None, None, finished)  # type: ignore[arg-type]  # neither is its config
    artifact = ArtifactDir(open_storage(tmp_path), "export")
    (artifact.local / "hf").mkdir()
    (artifact.local / "hf" / "half.txt").write_text("of an attempt that died")
    config = ExportStageConfig(kind="export", needs=("train",), register_as=register_as)
    with Journal(tmp_path / "journal" / "export.jsonl") as journal:
        result = ExportStage().run(config, ExportInputs(train), StageContext("export", "e" * 64, artifact, journal))
    back = import_from_hf(artifact.local / result.directory)
    assert torch.equal(back.embedding.weight, found.model.embedding.weight)
    assert not (artifact.local / "hf" / "half.txt").exists()
    (event,) = [event for event, _ in read_events(tmp_path / "journal" / "export.jsonl")]
    if register_as:
        assert (event["event"], event["name"], event["path"]) == ("model", register_as, "hf")
        assert event["tags"]["train_stage"] == "train"
    else:
        assert (event["event"], event["path"]) == ("artifact", "hf/config.json")
    assert result.registered_as == register_as


def test_unknown_formats_are_refused():
    with pytest.raises(ValidationError, match="format"):
        ExportStageConfig.model_validate({"kind": "export", "format": "onnx"})


@pytest.mark.parametrize("name", ["team/model", "model:1", " ", ".", "..", "..model"])
def test_names_that_mlflow_refuses_are_refused_before_anything_runs(name):
    with pytest.raises(MlflowException):
        validation._validate_model_name(name)
    with pytest.raises(ValidationError, match="is no name for a model in MLflow"):
        ExportStageConfig(kind="export", register_as=name)


@pytest.mark.parametrize("name", ["model", "B'MOJO 130m, run 2", "a.b", "mod\u00e8le"])
def test_names_that_mlflow_accepts_are_accepted(name):
    validation._validate_model_name(name)
    assert ExportStageConfig(kind="export", register_as=name).register_as == name


def test_only_evaluations_of_the_exported_model_may_be_waited_for(tmp_path):
    tokens = write_tokens(tmp_path)
    train, other = (trained_on(tmp_path, tokens, name=name) for name in ("train", "other"))
    config = EvaluateStageConfig(kind="evaluate")
    evaluated = StageNode("evaluate", EvaluateStage(), config, EvaluateInputs(trained=train, tokens=(tokens,)))
    export = ExportStageConfig(kind="export")
    ExportStage().check("export", export, ExportInputs(train, (evaluated,)))
    with pytest.raises(FieldError, match=r"has 'evaluate', which does not evaluate the model of 'other'"):
        ExportStage().check("export", export, ExportInputs(other, (evaluated,)))
