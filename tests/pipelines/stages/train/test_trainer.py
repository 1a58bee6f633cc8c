"""What every backend must do, on DeepSpeed's trainer with 2 workers and on a plain one with 1; add a backend here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from base.errors import UserError
from data.shards import IGNORED_TARGET, TokenBatch
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.trainer import count_targets, require_targets
from tests.pipelines.stages.train import neuron_workers
from tests.pipelines.stages.train.deepspeed_workers import ZERO_STAGES, Result
from tests.pipelines.stages.train.plain_trainer import PlainTrainer
from tests.pipelines.stages.train.trainer_contract import Observed, Tensors, observe

pytestmark = pytest.mark.ci

BACKENDS = [
    "plain",
    *(f"deepspeed, ZeRO {stage}" for stage in ZERO_STAGES),
    *(f"neuron on {device}, {parallel}" for device in neuron_workers.DEVICES for parallel in neuron_workers.WAYS),
]


class Found(NamedTuple):
    """What each worker of a backend saw, and the named tensors after the last step."""

    workers: list[Observed]
    tensors: Tensors


@pytest.fixture(scope="module")
def by_backend(
    contract_config: Callable[[int], TrainStageConfig],
    deepspeed_result: Result,
    rehearsed_neuron: neuron_workers.Result,
    simulated_neuron: neuron_workers.Result,
    single_process: None,
) -> dict[str, Found]:
    plain, tensors = observe(PlainTrainer, contract_config(1))
    found = {"plain": Found([plain], tensors)}
    for stage in ZERO_STAGES:
        found[f"deepspeed, ZeRO {stage}"] = Found(deepspeed_result.observed[stage], deepspeed_result.tensors[stage])
    for device, result in {"cpu": rehearsed_neuron, "neuron": simulated_neuron}.items():
        for parallel in neuron_workers.WAYS:
            found[f"neuron on {device}, {parallel}"] = Found(result.observed[parallel], result.tensors[parallel])
    return found


@pytest.fixture(params=BACKENDS)
def found(request: pytest.FixtureRequest, by_backend: dict[str, Found]) -> Found:
    return by_backend[request.param]


def test_accumulated_micro_batches_take_the_step_of_one_large_batch(found: Found) -> None:
    for seen in found.workers:
        assert seen.norms_in_one_micro_batch == pytest.approx(seen.norms, rel=1e-4)


def test_batches_may_grow(found: Found, by_backend: dict[str, Found]) -> None:
    norms = by_backend["plain"].workers[0].norms_of_growing_batches
    assert len(set(norms)) == 3
    assert found.workers[0].norms_of_growing_batches == pytest.approx(norms, rel=1e-4)


def test_every_backend_takes_the_same_steps(found: Found, by_backend: dict[str, Found]) -> None:
    plain = by_backend["plain"]
    assert found.workers[0].norms == pytest.approx(plain.workers[0].norms, rel=2e-6)
    assert found.tensors.keys() == plain.tensors.keys()
    for key, value in plain.tensors.items():
        assert float((found.tensors[key] - value).norm() / value.norm()) < 2e-4, key


def test_every_backend_has_the_same_norms_by_group(found: Found, by_backend: dict[str, Found]) -> None:
    plain = by_backend["plain"].workers[0]
    for seen in found.workers:
        assert seen.group_norms == pytest.approx(plain.group_norms, rel=1e-4)
    gradients = [norm for name, norm in plain.group_norms.items() if name.startswith("train/norm/gradient/")]
    assert math.sqrt(sum(norm**2 for norm in gradients)) == pytest.approx(plain.norms[0], rel=1e-6)


def test_a_step_says_what_it_was_taken_on(found: Found) -> None:
    for seen in found.workers:
        assert seen.num_targets == seen.expected_targets
        nll_sum = sum(each.nll_sum for each in found.workers)
        assert seen.loss == pytest.approx(nll_sum / seen.num_targets, rel=1e-5)


def test_losses_of_tokens_fit_the_targets_and_change_nothing(found: Found) -> None:
    assert all(seen.losses_fit_the_targets and seen.validation_changes_nothing for seen in found.workers)


def test_named_tensors_are_whole_and_in_float32(found: Found) -> None:
    assert all(seen.shapes_are_those_of_the_tensors and seen.tensors_are_float32 for seen in found.workers)
    moments = [value for key, value in found.tensors.items() if key.startswith("exp_avg_sq/")]
    assert len(moments) * 3 == len(found.tensors)
    assert all(float(value.abs().max()) > 0 for value in moments)


def test_pieces_of_all_workers_hold_each_element_once(found: Found) -> None:
    for seen in found.workers:
        assert seen.pieces_cover_each_element_once
        assert seen.pieces_are_those_of_the_tensors


def test_a_rewound_trainer_takes_the_same_steps_again_bitwise(found: Found) -> None:
    assert all(seen.rewinds_bitwise for seen in found.workers)


def test_named_tensors_are_put_back_exactly_and_training_resumes_bitwise(found: Found) -> None:
    assert all(seen.put_back_exactly and seen.resumes_bitwise for seen in found.workers)


def test_a_step_that_is_not_finite_says_so_and_is_not_applied(found: Found) -> None:
    assert all(not math.isfinite(seen.ruined_norm) and seen.ruined_changes_nothing for seen in found.workers)


def test_a_step_that_is_not_finite_leaves_no_trace_in_those_that_follow(found: Found) -> None:
    """Not in AdamW's step count either, by which it corrects the moments."""
    assert all(seen.goes_on_after_a_ruined_step for seen in found.workers)


def test_a_step_above_its_loss_limit_says_so_and_leaves_no_trace(found: Found) -> None:
    """goes_on_after_a_ruined_step is seen after it; a loss that is the limit is within it."""
    for seen in found.workers:
        assert math.isfinite(seen.refused_loss)
        assert not math.isfinite(seen.refused_norm)
        assert seen.loss_at_its_limit_is_applied
        assert seen.goes_on_after_a_ruined_step


def test_versions_name_torch(found: Found) -> None:
    assert all(seen.versions["torch"] == torch.__version__ for seen in found.workers)


def test_a_global_batch_without_an_answer_is_refused(single_process: None) -> None:
    nothing = torch.full((2, 4), IGNORED_TARGET)
    batch = TokenBatch(torch.zeros((2, 4), dtype=torch.int64), nothing, torch.zeros((2, 4), dtype=torch.int64))
    with pytest.raises(UserError, match=r"no token of a global batch is an answer .* Raise train\.global_batch_size"):
        require_targets(int(count_targets([batch, batch], torch.device("cpu")).total))
    one = batch._replace(targets_bt=nothing.clone().index_fill_(1, torch.tensor([1]), 7))
    assert count_targets([batch, one], torch.device("cpu")) == ([0, 2], 2)
    require_targets(2)
