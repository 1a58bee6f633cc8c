"""Speed while training."""

from __future__ import annotations

import pytest

from pipelines.stages.train import meter as meter_module
from pipelines.stages.train.device import CPU
from pipelines.stages.train.meter import Meter


class HandSetClock:
    """A `time` module whose clock stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s


def test_meter_counts_time_from_step_to_step_but_not_while_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandSetClock()
    monkeypatch.setattr(meter_module, "time", clock)
    meter = Meter(flops_per_token=10.0, device=CPU)
    for _ in range(2):
        for _ in range(2):
            meter.start()
            clock.now_s += 0.125
        meter.stop()
        meter.count(100)
        clock.now_s += 8.0  # validation
        meter.stop()
    assert meter.take() == (400.0, 0.5)
    assert meter.take() == (0.0, 0.0)
    assert meter.total_time_s == 0.5


def test_the_device_is_waited_for_only_where_the_clock_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(meter_module, "synchronize", waits.append)
    meter = Meter(flops_per_token=10.0, device=CPU)
    meter.start()
    meter.start()
    meter.count(100)
    assert not waits
    meter.stop()
    meter.stop()
    assert waits == [CPU]


def test_mfu_is_the_share_of_a_peak_that_is_known() -> None:
    meter = Meter(flops_per_token=10.0, device=CPU)
    assert meter.mfu(400.0, peak_flops=1e6) == pytest.approx(400.0 * 10.0 / 1e6)
    assert meter.mfu(400.0, peak_flops=None) is None
