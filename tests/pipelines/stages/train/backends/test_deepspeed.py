"""ZeRO really shards, and bf16 is autocast only. What every backend must do is in test_trainer.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from base.errors import UserError
from bmojo import BMojoLM, ModelConfig
from pipelines.stages.train.backends.config import DeepSpeedConfig, OffloadConfig
from pipelines.stages.train.backends.deepspeed import sharding, use_float8
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.planning.states import model_size
from tests.pipelines.stages.train.deepspeed_workers import BF16_STAGES, NUM_WORKERS, ZERO_STAGES, Result

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_each_worker_holds_its_share_of_the_optimizer_state(deepspeed_result: Result, stage: int) -> None:
    for share in deepspeed_result.local_share[stage]:
        assert share == pytest.approx(1.0 if stage == 0 else 0.5, abs=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2])  # under ZeRO 3 DeepSpeed keeps the small parameters of a tiny model whole
def test_a_plan_knows_what_a_worker_keeps(
    contract_config: Callable[[int], TrainStageConfig], deepspeed_result: Result, stage: Literal[0, 1, 2]
) -> None:
    config = contract_config(NUM_WORKERS)
    planned = DeepSpeedConfig(kind="deepspeed", zero_stage=stage).states(
        model_size(config), NUM_WORKERS, on_gpu=False, accumulates=True
    )
    for held in deepspeed_result.held_bytes[stage]:
        assert held == pytest.approx(planned.parameters + planned.optimizer, rel=0.02)


@pytest.mark.parametrize("stage", BF16_STAGES)
def test_bf16_leaves_parameters_and_moments_in_float32(deepspeed_result: Result, stage: int) -> None:
    found, fp32_norms = deepspeed_result.bf16[stage], deepspeed_result.observed[stage][0].norms
    assert found["parameter_dtypes"] == found["dtypes"] == ["torch.float32"]
    assert found["norms"] == pytest.approx(fp32_norms, rel=0.1)
    assert found["norms"] != fp32_norms, "autocast must have changed something"


def test_a_step_without_sharding_waits_for_nothing_on_the_device(deepspeed_result: Result) -> None:
    of_host_batches = 4  # the targets of each micro batch are counted on the host
    assert deepspeed_result.scalars_read[0] == of_host_batches
    assert deepspeed_result.scalars_read[1] > of_host_batches, "ZeRO looks at gradients and norm in every step"


def test_float8_is_refused_where_it_cannot_run_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"train\.precision is float8: float8 products need an NVIDIA GPU.*bf16"):
        use_float8(BMojoLM(ModelConfig(vocab_size=16, d_model=64, num_heads=1, pattern="swa")), CPU)


def test_nothing_is_sharded_over_one_gpu(single_process: None) -> None:
    gpu, one = torch.device("cuda"), DeepSpeedConfig(kind="deepspeed", zero_stage=2)
    assert sharding(one, gpu).zero_stage == 0
    assert sharding(one, CPU) == one
    offloaded = one.model_copy(update={"offload": OffloadConfig()})
    assert sharding(offloaded, gpu) == offloaded


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_activation_checkpointing_changes_no_bit(deepspeed_result: Result, stage: int) -> None:
    assert deepspeed_result.is_recomputed_alike[stage]


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_nothing_is_left_to_deepspeeds_defaults_which_move(deepspeed_result: Result, stage: int) -> None:
    engine = deepspeed_result.engine[stage]
    assert engine["gradient_clipping"] == (0.99 if stage else 0.0), "without ZeRO we clip"
    assert engine["clip_grad"] == (0.99 if stage else None)
    assert engine["dtype"] == "torch.float32", "in which ZeRO always looks at the norm, so no flag turns that off"
    assert engine["timeout_s"] == 123
    assert not engine["is_world"], "if it is, DeepSpeed has no group of its own and needs no time-out for it"
