"""Transfer: nothing changes at the base's size, activations move alike at every size, and the best rate stays put."""

from __future__ import annotations

import pytest
import torch

from pipelines.stages.train.optimizers.groups import parameter_groups
from pipelines.stages.train.optimizers.transfer import Factors, factors_of
from tests.pipelines.stages.train.optimizers.transfer_check import BASE_WIDTH, initial, last_loss, moved, settings


def test_at_the_size_of_the_base_nothing_changes() -> None:
    with_transfer, without = (settings(BASE_WIDTH, 2, transfers) for transfers in (True, False))
    one, other = initial(with_transfer, 3), initial(without, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    groups = [parameter_groups(model, config) for model, config in ((one, with_transfer), (other, without))]
    described = [[{**group, "params": len(group["params"])} for group in of_one] for of_one in groups]
    assert described[0] == described[1]


def test_factors_of_a_model_twice_as_wide_and_three_times_as_deep() -> None:
    config = settings(2 * BASE_WIDTH, 6, transfers=True)
    found = factors_of(initial(config, 0), config.transfer)
    expected = {
        "embedding.weight": Factors(eps=1 / 2),
        "norm.weight": Factors(1 / 2, 1 / 2),
        "blocks.0.mixer.projections.q_proj.weight": Factors(2**-0.5, 1 / 2, 2, 1 / 6),
        "blocks.1.mixer.in_proj.weight": Factors(2**-0.5, 1 / 2, 2, 1 / 6),
        "blocks.0.mixer.ssm.out_proj.weight": Factors(1, 1 / 2, 2, 1 / 6),
        "blocks.0.mixer.out_proj.weight": Factors(6**-0.5, 1 / 6, 6, 1 / 2),
        "blocks.0.mlp.down_proj.weight": Factors(6**-0.5, 1 / 6, 6, 1 / 2),
        "blocks.0.mixer.fading_gain": Factors(1 / 3, 1 / 3),
        "blocks.1.mixer.A_log": Factors(eps=1 / 3),
    }
    for name, factors in expected.items():
        assert found[name] == pytest.approx(factors), name


def test_initial_values_have_the_standard_deviations_of_the_paper() -> None:
    """init_std / sqrt(m) inside; what a layer adds: the base's init_std / sqrt(2 layers m), and 1 / l."""
    config = settings(4 * BASE_WIDTH, 8, transfers=True)
    model, std = initial(config, 0), config.model.init_std
    for name, expected in (
        ("embedding.weight", std),
        ("blocks.0.mlp.gate_up_proj.weight", std / 2),
        ("blocks.0.mlp.down_proj.weight", std / (2 * 2) ** 0.5 / 2 / 4),
    ):
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(expected, rel=0.05), name


@pytest.mark.ci
def test_activations_move_as_far_at_every_width_and_depth_and_without_transfer_they_do_not() -> None:
    base = moved(BASE_WIDTH, 2, transfers=True)
    wide, deep = moved(4 * BASE_WIDTH, 2, transfers=True), moved(BASE_WIDTH, 8, transfers=True)
    assert wide.hidden == pytest.approx(base.hidden, rel=0.15)
    assert deep.hidden == pytest.approx(base.hidden, rel=0.4)
    assert wide.logits < 1.15 * base.logits
    assert moved(4 * BASE_WIDTH, 2, transfers=False).hidden > 1.8 * base.hidden
    assert moved(BASE_WIDTH, 8, transfers=False).hidden > 1.8 * base.hidden


@pytest.mark.slow
def test_the_best_learning_rate_stays_put_over_three_widths() -> None:
    rates = [0.008, 0.032, 0.128]
    for width in (BASE_WIDTH, 2 * BASE_WIDTH, 4 * BASE_WIDTH):
        losses = {rate: last_loss(width, True, rate, num_steps=60) for rate in rates}
        assert min(losses, key=lambda rate: losses[rate]) == rates[1], (width, losses)
