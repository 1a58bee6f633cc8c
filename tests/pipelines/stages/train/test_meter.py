"""Speed while training."""

from __future__ import annotations

import time

import pytest

from pipelines.stages.train.device import CPU
from pipelines.stages.train.meter import Meter


def test_meter_counts_only_time_inside_steps() -> None:
    meter = Meter(flops_per_token=10.0, peak_flops=1e6, device=CPU)
    for _ in range(2):
        meter.start_step()
        time.sleep(0.02)
        meter.end_step(100)
        time.sleep(0.1)  # validation
    tokens_per_s, mfu = meter.take()
    assert 200 / 0.1 < tokens_per_s <= 200 / 0.04
    assert mfu == pytest.approx(tokens_per_s * 10.0 / 1e6)
    assert meter.take() == (0.0, 0.0)
    assert meter.total_time_s >= 0.04


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = Meter(flops_per_token=10.0, peak_flops=None, device=CPU)
    meter.start_step()
    meter.end_step(100)
    tokens_per_s, mfu = meter.take()
    assert tokens_per_s > 0
    assert mfu is None
