"""The learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.schedule import learning_rate

MakeConfig = Callable[..., TrainStageConfig]


def test_warm_up_rises_linearly_to_the_full_rate(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=10, max_steps=100)
    assert [learning_rate(config, step, 100) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("schedule", [{"kind": "cosine"}, {"kind": "wsd", "decay_fraction": 0.2}])
def test_last_step_has_the_lowest_rate(train_config: MakeConfig, schedule: dict[str, object]) -> None:
    config = train_config(lr=2.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=100, schedule=schedule)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[-1] == pytest.approx(0.2)
    assert max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_wsd_is_flat_until_the_decay(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=5, max_steps=100, schedule={"kind": "wsd", "decay_fraction": 0.2})
    assert {learning_rate(config, step, 100) for step in range(5, 81)} == {1.0}
    assert learning_rate(config, 90, 100) == pytest.approx(0.55)


def test_no_warm_up_starts_near_the_full_rate(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=0, max_steps=1000)
    assert learning_rate(config, 1, 1000) == pytest.approx(1.0, abs=1e-4)


def test_decay_longer_than_what_warm_up_leaves_is_cut(train_config: MakeConfig) -> None:
    config = train_config(lr=1.0, warmup_steps=50, max_steps=100, schedule={"kind": "wsd", "decay_fraction": 1.0})
    assert learning_rate(config, 51, 100) < 1.0
    assert learning_rate(config, 50, 100) == 1.0
