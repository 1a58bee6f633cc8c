"""Achieved speed: tokens per second, and model FLOP/s as a share of what the devices' matrix products reach (MFU)."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from pipelines.stages.train.device import synchronize


class Speed(NamedTuple):
    """Tokens per second of all workers together, and the seconds in which they were measured."""

    tokens_per_s: float
    seconds: float


class Meter:
    """Tokens and seconds of training steps; validation and checkpoints do not count.

    The clock runs from one step into the next, because stopping it waits for the device.
    """

    def __init__(self, flops_per_token: float, device: torch.device) -> None:
        self.total_time_s = 0.0
        self._flops_per_token, self._device = flops_per_token, device
        self._tokens, self._time_s = 0, 0.0
        self._start: float | None = None

    def start(self) -> None:
        """Let the clock run, if it does not."""
        if self._start is None:
            self._start = time.perf_counter()

    def stop(self) -> None:
        """Wait for the steps that were begun, and stop the clock, if it runs."""
        if self._start is not None:
            synchronize(self._device)
            elapsed_s = time.perf_counter() - self._start
            self._time_s += elapsed_s
            self.total_time_s += elapsed_s
            self._start = None

    def count(self, num_tokens: int) -> None:
        """So many tokens were trained on, by all workers together."""
        self._tokens += num_tokens

    def take(self) -> Speed:
        """The speed since the last call."""
        tokens_per_s, seconds = self._tokens / self._time_s if self._time_s else 0.0, self._time_s
        self._tokens, self._time_s = 0, 0.0
        return Speed(tokens_per_s, seconds)

    def mfu(self, tokens_per_s: float, peak_flops: float | None) -> float | None:
        """Share of a peak, of all workers together, that `tokens_per_s` amounts to; None where it is not known."""
        return tokens_per_s * self._flops_per_token / peak_flops if peak_flops is not None else None
