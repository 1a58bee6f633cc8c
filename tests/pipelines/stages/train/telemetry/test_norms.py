"""Norms by group against those computed from the whole tensors; other backends: test_trainer.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.telemetry.norms import GroupNorms, group_of
from tests.pipelines.stages.train.plain_trainer import PlainTrainer
from tests.pipelines.stages.train.trainer_contract import LR, initial_model, micro_batches, model_with, snapshot

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.weight", "embedding"),
        ("head.weight", "head"),
        ("norm.weight", "norms"),
        ("blocks.0.mixer_norm.weight", "norms"),
        ("blocks.1.mlp_norm.weight", "norms"),
        ("blocks.1.mlp.gate_up_proj.weight", "mlp"),
        ("blocks.0.mixer.ssm.norm.weight", "bmojo"),
        ("blocks.1.mixer.A_log", "mamba2"),
    ],
)
def test_groups_of_parameters(name: str, group: str) -> None:
    assert group_of(name, ("bmojo", "mamba2")) == group


@pytest.fixture
def config(train_config: Callable[..., TrainStageConfig], tiny_model: dict[str, Any]) -> TrainStageConfig:
    return train_config(model=tiny_model | {"vocab_size": 64}, grad_clip=0.1)


def test_norms_are_those_of_the_whole_tensors(config: TrainStageConfig) -> None:
    trainer = PlainTrainer(initial_model(config), config)
    norms = GroupNorms(trainer, every_steps=2)
    trainer.step(micro_batches(config, 0), LR)
    before = snapshot(trainer)
    unclipped = PlainTrainer(model_with(config, before), config)
    batches = micro_batches(config, 1)
    num_targets = sum(int((batch.targets_bt >= 0).sum()) for batch in batches)
    for batch in batches:
        (unclipped.model(*batch).loss * int((batch.targets_bt >= 0).sum()) / num_targets).backward()
    gradients = {name: param.grad for name, param in unclipped.model.named_parameters() if param.grad is not None}
    result = trainer.step(batches, LR, before_update=norms.watch(2, is_logged=True))
    points = norms.points(float(result.grad_norm))
    after = snapshot(trainer)
    for group in ("embedding", "bmojo", "mamba2", "mlp", "norms"):
        names = [name for name in gradients if group_of(name, config.model.mixers) == group]
        weight, moved, gradient = (
            float(torch.cat([values.flatten().double() for values in each]).norm())
            for each in (
                [before[f"param/{name}"] for name in names],
                [after[f"param/{name}"] - before[f"param/{name}"] for name in names],
                [gradients[name] for name in names],
            )
        )
        assert points[f"train/norm/weight/{group}"] == pytest.approx(weight, rel=1e-5)
        assert points[f"train/norm/update/{group}"] == pytest.approx(moved / weight, rel=1e-4)
        assert points[f"train/norm/gradient/{group}"] == pytest.approx(gradient, rel=1e-4), "before clipping"


def test_only_due_steps_are_watched_and_none_that_was_not_applied(config: TrainStageConfig) -> None:
    trainer = PlainTrainer(initial_model(config), config)
    norms = GroupNorms(trainer, every_steps=2)
    assert norms.watch(1, is_logged=True) is None
    assert norms.watch(2, is_logged=False) is None
    assert norms.points(1.0) == {}
    assert norms.watch(2, is_logged=True) is not None
    assert norms.points(grad_norm=None) == {}
