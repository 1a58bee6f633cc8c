"""Small settings shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from pipelines.stages.train.config import TrainStageConfig
from tests.pipelines.stages.train import neuron_workers
from tests.pipelines.stages.train.deepspeed_workers import NUM_WORKERS, Result, run_workers
from tests.pipelines.stages.train.trainer_contract import NUM_SAMPLES, VOCAB_SIZE
from tests.pipelines.stages.train.training import Tokens, write_tokens

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


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """A tokenize stage's artifact of 60 small documents."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def contract_config(train_config: Callable[..., TrainStageConfig]) -> Callable[[int], TrainStageConfig]:
    """Settings that trainer_contract asks for, by the number of workers."""

    def make(num_workers: int) -> TrainStageConfig:
        return train_config(
            model=TINY_MODEL | {"vocab_size": VOCAB_SIZE},
            global_batch_size=NUM_SAMPLES,
            micro_batch_size=NUM_SAMPLES // num_workers // 4,
            groups=[{"match": "*.mlp.*", "lr_ratio": 0.9, "weight_decay": 0.2}],
            collective_timeout_s=123,
            grad_clip=0.99,
            # AdamW divides by the size of a gradient: one that is all rounding would move its weight as far as others.
            eps=1e-3,
            resources={"num_workers": num_workers},
        )

    return make


@pytest.fixture(scope="session")
def deepspeed_result(
    contract_config: Callable[[int], TrainStageConfig], tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """What two workers saw of DeepSpeed's trainer."""
    return run_workers(contract_config(NUM_WORKERS), tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="session")
def rehearsed_neuron(
    contract_config: Callable[[int], TrainStageConfig], tmp_path_factory: pytest.TempPathFactory
) -> neuron_workers.Result:
    """What two workers saw of the Neuron backend's trainer, rehearsed on the CPU."""
    return neuron_workers.run_workers(contract_config(2), tmp_path_factory.mktemp("neuron-cpu"), "cpu")


@pytest.fixture(scope="session")
def simulated_neuron(
    contract_config: Callable[[int], TrainStageConfig], tmp_path_factory: pytest.TempPathFactory
) -> neuron_workers.Result:
    """What two workers saw of it on the simulated device."""
    return neuron_workers.run_workers(contract_config(2), tmp_path_factory.mktemp("neuron"), "neuron")


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
