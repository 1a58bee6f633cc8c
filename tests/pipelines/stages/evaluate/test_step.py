"""Any checkpoint that training kept can be evaluated, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import DamagedError, UserError
from bmojo import BMojoLM
from pipelines.engine.stage import StageContext, StageNode
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import EvaluateInputs, EvaluateStage
from pipelines.stages.evaluate.subject import TrainedModel
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import device
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.stage import TrainStage
from pipelines.stages.train.trainer import PARAM
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal
from tests.pipelines.stages.evaluate.here import trained_on
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


def keep_checkpoint(artifact: ArtifactDir, step: int, model: BMojoLM) -> None:
    values = {name: value.detach().flatten() for name, value in model.named_parameters()}
    pieces = {f"{PARAM}/{name}": Piece(0, value) for name, value in values.items()}
    pieces |= {f"exp_avg/{name}": Piece(0, torch.zeros_like(value)) for name, value in values.items()}
    entries = checkpoints.write_rank_files(artifact, step, 0, 1, pieces, device.rng_state(device.CPU))
    state = checkpoints.TrainingState(
        step=step, num_tokens=1, num_samples=1, optimizer_steps=step, num_workers=1, data={}, train_loss=1.0,
        initial_valid_loss=None, train_time_s=1.0, history={}, versions={},
    )  # fmt: skip
    checkpoints.complete(artifact, state, entries)


def of_step(step: int, **fields: Any) -> EvaluateStageConfig:
    return EvaluateStageConfig.model_validate({"kind": "evaluate", "step": step, **fields})


def test_the_model_is_that_of_the_checkpoint_to_the_last_bit(tmp_path: Path, tokens: Tokens) -> None:
    trained = trained_on(tmp_path, tokens)
    earlier = tiny_model()
    earlier.init_weights(seed=7)
    keep_checkpoint(trained.artifact, 4, earlier)
    loaded = TrainedModel(trained.artifact, "model", step=4).load(on_gpu=False).module
    final = TrainedModel(trained.artifact, "model").load(on_gpu=False).module
    assert not loaded.training
    for name, value in loaded.named_parameters():
        assert torch.equal(value, earlier.get_parameter(name)), name
    assert not torch.equal(final.embedding.weight, loaded.embedding.weight)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, tokens: Tokens) -> None:
    trained = trained_on(tmp_path, tokens)
    keep_checkpoint(trained.artifact, 4, tiny_model())
    (file,) = (trained.artifact.local / step_dir(4)).glob("tensors-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"tensors-.*SHA-256 differs.*Evaluate another step"):
        TrainedModel(trained.artifact, "model", step=4).load(on_gpu=False)


def run(config: EvaluateStageConfig, trained: StageNode[TrainStage], tokens: Tokens, folder: Path) -> None:
    with Journal(folder / "journal.jsonl") as journal:
        context = StageContext("evaluate", "0" * 64, ArtifactDir.at(folder / "evaluate"), journal)
        EvaluateStage().run(config, EvaluateInputs(trained=trained, tokens=(tokens,)), context)


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(tmp_path: Path, tokens: Tokens) -> None:
    trained = trained_on(tmp_path, tokens)
    assert trained.output.steps == 1
    for step in (8, 12):
        keep_checkpoint(trained.artifact, step, tiny_model())
    (trained.artifact.local / step_dir(12) / "manifest.json").unlink()  # caught half-way
    keep_checkpoint(trained.artifact, 16, tiny_model())
    expected = r"stages\.evaluate\.step: found 12, but stage 'train' keeps no checkpoint .* It keeps: 8, 16; its final"
    with pytest.raises(UserError, match=expected):
        run(of_step(12), trained, tokens, tmp_path)


def test_a_step_that_is_never_reached_is_refused_before_the_start(tmp_path: Path, tokens: Tokens) -> None:
    inputs = EvaluateInputs(trained=trained_on(tmp_path, tokens), tokens=(tokens,))
    EvaluateStage().check("evaluate", of_step(1), inputs)
    with pytest.raises(FieldError, match=r"stages\.evaluate\.step: found 2, but 'train' trains for 1 steps"):
        EvaluateStage().check("evaluate", of_step(2), inputs)
