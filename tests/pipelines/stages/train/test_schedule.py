"""The learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.engine.fingerprint import config_that_matters
from pipelines.stages.train.config import TrainStageConfig

MakeConfig = Callable[..., TrainStageConfig]


def test_warm_up_rises_linearly_to_the_full_rate(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=10, max_steps=100)
    assert [config.learning_rate(step, 100) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


FALLING = [
    {"kind": "cosine"},
    {"kind": "linear"},
    {"kind": "wsd", "decay_fraction": 0.2},
    {"kind": "wsd", "decay": "sqrt"},
]


@pytest.mark.parametrize("schedule", FALLING)
def test_last_step_has_the_lowest_rate(train_config: MakeConfig, schedule: dict[str, object]) -> None:
    config = train_config(lr=2.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=100, schedule=schedule)
    rates = [config.learning_rate(step, 100) for step in range(1, 101)]
    assert rates[-1] == pytest.approx(0.2)
    assert max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_wsd_is_flat_until_the_decay(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=5, max_steps=100, schedule={"kind": "wsd", "decay_fraction": 0.2})
    assert {config.learning_rate(step, 100) for step in range(5, 81)} == {1.0}
    assert config.learning_rate(90, 100) == pytest.approx(0.55)


def test_no_warm_up_starts_near_the_full_rate(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=0, max_steps=1000)
    assert config.learning_rate(1, 1000) == pytest.approx(1.0, abs=1e-4)


def test_decay_longer_than_what_warm_up_leaves_is_cut(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=50, max_steps=100, schedule={"kind": "wsd", "decay_fraction": 1.0})
    assert config.learning_rate(51, 100) < 1.0
    assert config.learning_rate(50, 100) == 1.0


def test_schedules_by_hand(train_config: MakeConfig) -> None:
    """Of 110 steps after 10 of warm-up, from 2 down to 0.2: at a quarter, at half, at the last step."""

    def rates(schedule: dict[str, object]) -> list[float]:
        config = train_config(lr=2.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=110, schedule=schedule)
        return [config.learning_rate(step, 110) for step in (35, 60, 110)]

    assert rates({"kind": "cosine"}) == pytest.approx([2 * (0.55 + 0.45 * 2**-0.5), 1.1, 0.2])
    assert rates({"kind": "linear"}) == pytest.approx([1.55, 1.1, 0.2])
    assert rates({"kind": "wsd", "decay_fraction": 1, "decay": "linear"}) == pytest.approx([1.55, 1.1, 0.2])
    assert rates({"kind": "wsd", "decay_fraction": 1, "decay": "sqrt"}) == pytest.approx([1.1, 2 - 1.8 * 0.5**0.5, 0.2])
    assert rates({"kind": "constant"}) == [2.0, 2.0, 2.0]
    assert rates({"kind": "inverse_sqrt"}) == pytest.approx([2 * (10 / step) ** 0.5 for step in (35, 60, 110)])


def test_the_inverse_root_stops_at_the_lowest_rate_and_does_not_know_the_end(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, min_lr_ratio=0.5, warmup_steps=0, max_steps=100, schedule={"kind": "inverse_sqrt"})
    assert config.learning_rate(1, 100) == config.learning_rate(1, 10**6) == 1.0
    assert config.learning_rate(100, 100) == 0.5


def test_a_schedule_keeps_its_results_from_before_its_decay_had_a_shape(train_config: MakeConfig) -> None:
    def hashed(schedule: dict[str, object]) -> object:
        return config_that_matters(train_config(schedule=schedule))["schedule"]

    assert hashed({"kind": "wsd"}) == {"kind": "wsd", "decay_fraction": 0.2}
    assert hashed({"kind": "wsd", "decay": "sqrt"}) == {"kind": "wsd", "decay_fraction": 0.2, "decay": "sqrt"}
