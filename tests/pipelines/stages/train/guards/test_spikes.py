"""The limit of a spike against numpy, and its window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.stages.train.device import CPU
from pipelines.stages.train.guards.config import SpikeConfig
from pipelines.stages.train.guards.spikes import SpikeGuard

NORM = torch.tensor(1.0)


def filled(losses: list[float], window: int, z: float = 6.0) -> SpikeGuard:
    guard = SpikeGuard(SpikeConfig(window=window, z=z), CPU)
    for loss in losses:
        guard.add(torch.tensor(loss, dtype=torch.float64), NORM)
    return guard


@pytest.mark.parametrize("window", [8, 9])
def test_the_limit_is_the_median_and_so_many_median_distances_above_it(window: int) -> None:
    losses = np.random.default_rng(0).normal(3, 0.5, 2 * window + 3).tolist()
    last = np.array(losses[-window:])
    spread = 1.4826 * np.median(abs(last - np.median(last)))
    guard = filled(losses, window, z=4.0)
    median, limit = guard.limit()
    assert float(median) == pytest.approx(np.median(last), rel=1e-12)
    assert float(limit) == pytest.approx(np.median(last) + 4 * spread, rel=1e-12)
    assert guard.z_of(np.median(last) + 5 * spread, float(median), float(limit)) == pytest.approx(5)


def test_a_flat_curve_has_no_spikes_within_its_floor() -> None:
    assert float(filled([2.0] * 8, 8).limit().limit) == pytest.approx(2.0 * (1 + 6 * 0.01))


def test_there_is_no_limit_before_the_window_is_full() -> None:
    assert math.isinf(float(filled([2.0] * 7, 8).limit().limit))


def test_steps_that_were_not_applied_stay_out_of_the_window() -> None:
    guard, expected = filled([1.0, 2.0, 3.0, 4.0] * 3, 8), filled([1.0, 2.0, 3.0, 4.0] * 3, 8).limit()
    guard.add(torch.tensor(100.0, dtype=torch.float64), torch.tensor(math.nan))
    guard.add(torch.tensor(math.nan, dtype=torch.float64), NORM)
    assert guard.limit() == expected
    guard.add(torch.tensor(100.0, dtype=torch.float64), NORM)
    assert guard.limit() != expected


@pytest.mark.parametrize("num_losses", [5, 8, 21])
def test_a_restored_window_gives_the_same_limits(num_losses: int) -> None:
    losses = np.random.default_rng(1).normal(3, 0.5, num_losses).tolist()
    unbroken, resumed = filled(losses, 8), SpikeGuard(SpikeConfig(window=8), CPU)
    resumed.load(losses[-8:])
    for loss in np.random.default_rng(2).normal(2, 0.5, 12).tolist():
        for guard in (unbroken, resumed):
            guard.add(torch.tensor(loss, dtype=torch.float64), NORM)
        assert resumed.limit() == unbroken.limit()
