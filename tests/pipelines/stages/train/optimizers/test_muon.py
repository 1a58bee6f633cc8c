"""Muon against a float64 reference: alone, and under every ZeRO stage on two workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.muon import orthogonalized
from tests.pipelines.stages.train.deepspeed_workers import ZERO_STAGES, Result, muon_config
from tests.pipelines.stages.train.optimizers.muon_reference import is_matrix_of_a_block, iterated, steps_by_hand
from tests.pipelines.stages.train.trainer_contract import LR, NUM_STEPS, Tensors


@pytest.mark.parametrize("shape", [(7, 7), (5, 16), (16, 5), (1, 9)])
def test_iterations_change_the_singular_values_only(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrix, 5, torch.float64)
    np.testing.assert_allclose(found.numpy(), iterated(matrix.numpy(), 5), rtol=1e-5, atol=1e-6)
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.25


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert not orthogonalized(torch.zeros(3, 4), 5, torch.float32).any()


@pytest.fixture(scope="module")
def by_hand(contract_config: Callable[[int], TrainStageConfig]) -> tuple[Tensors, list[float]]:
    return steps_by_hand(muon_config(contract_config(1)), NUM_STEPS, LR)


@pytest.mark.ci
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_every_zero_stage_takes_the_steps_of_the_reference(
    deepspeed_result: Result, by_hand: tuple[Tensors, list[float]], stage: int
) -> None:
    found, (expected, norms) = deepspeed_result.muon[stage], by_hand
    assert found.norms == pytest.approx(norms, rel=1e-4)
    assert {key for key in found.tensors if not key.startswith("ema/")} == expected.keys()
    for key, value in expected.items():
        if is_matrix_of_a_block(key.split("/", 1)[1]):
            # The way a matrix went, not where it is: what was there before would hide an error.
            before = found.weights_by_step[0].get(key, torch.zeros(()))
            error = float((found.tensors[key] - value).norm() / (value - before).norm())
            assert error < 5e-3, key


@pytest.mark.ci
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_training_by_muon_resumes_bitwise(deepspeed_result: Result, stage: int) -> None:
    assert deepspeed_result.muon[stage].resumes_bitwise


@pytest.mark.ci
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_a_step_that_is_left_out_leaves_momentum_and_averages_alone(deepspeed_result: Result, stage: int) -> None:
    assert deepspeed_result.muon[stage].skips_without_a_trace


@pytest.mark.ci
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_averages_are_means_of_the_weights_after_each_step(deepspeed_result: Result, stage: int) -> None:
    found = deepspeed_result.muon[stage]
    shares = [0.8 ** (NUM_STEPS - step) for step in range(1, NUM_STEPS + 1)]
    for key in found.weights_by_step[0]:
        after = [weights[key].double() for weights in found.weights_by_step[1:]]
        mean = sum(share * weights for share, weights in zip(shares, after, strict=True)) / sum(shares)
        torch.testing.assert_close(found.tensors[key.replace("param/", "ema/")].double(), mean, rtol=1e-5, atol=1e-7)
    assert found.averages_change_places


@pytest.mark.ci
def test_pieces_of_any_size_become_whole_and_come_back(deepspeed_result: Result) -> None:
    assert deepspeed_result.exchange_is_exact
