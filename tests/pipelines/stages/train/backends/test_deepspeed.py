"""ZeRO really shards, and bf16 is autocast only. What every backend must do is in test_trainer.py."""

from __future__ import annotations

import pytest

from tests.pipelines.stages.train.deepspeed_workers import ZERO_STAGES, Result


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_each_worker_holds_its_share_of_the_optimizer_state(deepspeed_result: Result, stage: int) -> None:
    for share in deepspeed_result.local_share[stage]:
        assert share == pytest.approx(1.0 if stage == 0 else 0.5, abs=0.02)


def test_bf16_leaves_parameters_and_moments_in_float32(deepspeed_result: Result) -> None:
    found, fp32_norms = deepspeed_result.bf16, deepspeed_result.observed[1][0].norms
    assert found["parameter_dtypes"] == found["dtypes"] == ["torch.float32"]
    assert found["norms"] == pytest.approx(fp32_norms, rel=0.1)
    assert found["norms"] != fp32_norms, "autocast must have changed something"
