"""Where the seconds of a step go, by part, without a wait that a logged step does not need."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch

from pipelines.stages.train.device import has_events, timed_event


class Part(StrEnum):
    """What a step spends time on."""

    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"


class StepTimes:
    """Seconds by part, each without the parts inside it.

    On the CPU, and on devices without events, every step is measured with the host's clock. On a GPU the host's clock
    sees only what the host waits for: data and checkpoints. The other parts are measured with events on the device, in
    steps that are logged only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_host = device, not has_events(device)
        self._is_measured = True  # this step
        self._open: list[Part] = []
        self._events: list[tuple[Part, Part | None, Any, Any]] = []  # with the part around it, start and end
        self._forget()

    def begin_step(self, is_logged: bool) -> None:
        """A step begins."""
        self._is_measured = self._on_host or is_logged
        self._num_steps += 1
        self._num_measured += self._is_measured

    @contextmanager
    def host(self, part: Part) -> Iterator[None]:
        """Measure what the host waits for."""
        around = self._open[-1] if self._open else None
        self._open.append(part)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._open.pop()
            self._add(self._on_the_host, part, around, time.perf_counter() - start)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Measure what the device does."""
        if self._on_host:
            with self.host(part):
                yield
            return
        if not self._is_measured:
            yield
            return
        around = self._open[-1] if self._open else None
        start, end = timed_event(self._device), timed_event(self._device)
        self._open.append(part)
        start.record()
        yield
        end.record()
        self._open.pop()
        self._events.append((part, around, start, end))

    def take(self) -> dict[Part, float]:
        """Seconds per step by part since the last call. The device must have done its work."""
        for part, around, start, end in self._events:
            self._add(self._on_the_device, part, around, start.elapsed_time(end) / 1e3)
        found = {part: seconds / self._num_steps for part, seconds in self._on_the_host.items() if self._num_steps}
        if self._num_measured:
            found |= {part: seconds / self._num_measured for part, seconds in self._on_the_device.items()}
        self._forget()
        return found

    def _add(self, seconds: dict[Part, float], part: Part, around: Part | None, elapsed_s: float) -> None:
        seconds[part] += elapsed_s
        if around is not None:
            seconds[around] -= elapsed_s

    def _forget(self) -> None:
        self._num_steps = self._num_measured = 0
        self._events.clear()
        self._on_the_host: dict[Part, float] = defaultdict(float)
        self._on_the_device: dict[Part, float] = defaultdict(float)
