"""DeepSpeed's trainer on 2 workers with accumulation, against a loop of plain torch that sees each batch whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from pipelines.stages.train.config import TrainStageConfig
from tests.pipelines.stages.train.deepspeed_workers import BF16_STAGES, ZERO_STAGES, Result
from tests.pipelines.stages.train.trainer_contract import HALFWAY, LR, NUM_STEPS, global_batch, initial_model

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def bare_losses(contract_config: Callable[[int], TrainStageConfig]) -> Callable[[bool], list[float]]:
    """Loss of each step, in float32 or under autocast to bfloat16."""

    def train(in_bf16: bool) -> list[float]:
        config = contract_config(1)
        model, group = initial_model(config), config.groups[0]
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = []
        for of_model in model.param_groups(config.weight_decay):
            for parameter in of_model["params"]:
                is_mlp = ".mlp." in names[parameter]
                decay = group.weight_decay if is_mlp else of_model["weight_decay"]
                rate = LR * (group.lr_ratio if is_mlp else 1.0)
                groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
        losses = []
        for number in range(NUM_STEPS):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
                loss = model(*global_batch(number)).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return train


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_losses_are_those_of_a_bare_loop_to_a_millionth(
    deepspeed_result: Result, bare_losses: Callable[[bool], list[float]], stage: int
) -> None:
    expected = bare_losses(False)
    for seen in deepspeed_result.observed[stage]:
        assert [seen.loss, *seen.losses] == pytest.approx([expected[0], *expected[HALFWAY:]], rel=1e-6)


@pytest.mark.parametrize("stage", BF16_STAGES)
def test_the_curve_in_bf16_is_that_of_a_bare_loop(
    deepspeed_result: Result, bare_losses: Callable[[bool], list[float]], stage: int
) -> None:
    found, in_float32 = deepspeed_result.bf16[stage]["losses"], bare_losses(False)
    assert found == pytest.approx(bare_losses(True), rel=1e-3)
    assert found != pytest.approx(in_float32, rel=1e-6), "autocast must have changed something"
