"""Seconds by part, with clocks that the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.stages.train.device import CPU
from pipelines.stages.train.telemetry import times as times_module
from pipelines.stages.train.telemetry.times import Part, StepTimes


class HandSetClock:
    """A `time` module, and events of a device, whose clock stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.num_events = 0

    def perf_counter(self) -> float:
        return self.now_s

    def event(self, device: torch.device) -> Event:
        self.num_events += 1
        return Event(self)


class Event:
    """As torch's."""

    def __init__(self, clock: HandSetClock) -> None:
        self._clock, self.at_s = clock, 0.0

    def record(self) -> None:
        self.at_s = self._clock.now_s

    def elapsed_time(self, end: Event) -> float:
        return (end.at_s - self.at_s) * 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandSetClock:
    clock = HandSetClock()
    monkeypatch.setattr(times_module, "time", clock)
    monkeypatch.setattr(times_module, "timed_event", clock.event)
    return clock


def take_step(times: StepTimes, clock: HandSetClock, is_logged: bool) -> None:
    times.begin_step(is_logged)
    with times.host(Part.DATA):
        clock.now_s += 1
    for _ in range(2):
        with times.part(Part.FORWARD):
            clock.now_s += 2
        with times.part(Part.BACKWARD):
            clock.now_s += 4
            with times.part(Part.COMMUNICATION):
                clock.now_s += 8
    clock.now_s += 100  # outside of every part


ONE_STEP: dict[Any, Any] = {"data": 1, "forward": 4, "backward": 8, "communication": 16}


def test_a_part_counts_without_the_parts_inside_it(clock: HandSetClock) -> None:
    times = StepTimes(CPU)
    for _ in range(3):
        take_step(times, clock, is_logged=False)
    assert times.take() == pytest.approx(ONE_STEP)
    take_step(times, clock, is_logged=True)
    assert times.take() == pytest.approx(ONE_STEP), "since the last call"
    assert times.take() == {}


def test_on_a_gpu_only_logged_steps_are_marked_and_all_waits_of_the_host_are(clock: HandSetClock) -> None:
    class Gpu:
        type = "cuda"

    times = StepTimes(Gpu())  # type: ignore[arg-type]  # what is asked of a torch.device
    for _ in range(4):
        take_step(times, clock, is_logged=False)
    assert clock.num_events == 0
    times.begin_step(is_logged=False)
    with times.host(Part.DATA):
        clock.now_s += 7
    take_step(times, clock, is_logged=True)
    assert clock.num_events == 2 * 6
    assert times.take() == pytest.approx(ONE_STEP | {"data": (4 + 7 + 1) / 6})
