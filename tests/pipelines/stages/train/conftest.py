"""Small settings shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.stages.train.config import TrainStageConfig

TINY_MODEL: dict[str, Any] = {
    "pattern": "(bmojo,mamba2)*1",
    "d_model": 64,
    "num_heads": 2,
    "window_size": 32,
    "chunk_size": 16,
    "num_eidetic": 8,
    "d_state": 16,
    "ssm_head_dim": 32,
}


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, Any]:
    """Fields of a small model with every kind of memory."""
    return dict(TINY_MODEL)


@pytest.fixture(scope="session")
def train_config() -> Callable[..., TrainStageConfig]:
    """Make a valid small TrainStageConfig with some fields changed."""

    def make(**changes: Any) -> TrainStageConfig:
        fields: dict[str, Any] = {
            "kind": "train",
            "model": TINY_MODEL,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 12,
            "warmup_steps": 2,
            "needs": ("tokens",),
        }
        if "max_tokens" in changes:
            fields.pop("max_steps")
        return TrainStageConfig.model_validate(fields | changes)

    return make
