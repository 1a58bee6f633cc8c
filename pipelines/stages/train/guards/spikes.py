"""Loss spikes, by a running robust z-score that lives on the device: no step waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from pipelines.stages.train.guards.config import SpikeConfig

_MAD_TO_STD = 1.4826  # of a normal distribution
_LEAST_SPREAD = 0.01  # of the median


class LossLimit(NamedTuple):
    """Where a spike begins, as float64 scalars on the device; infinite while the window is not full."""

    median: torch.Tensor
    limit: torch.Tensor


class SpikeGuard:
    """The last `window` losses of applied steps, and the limit that follows from them; the same on every rank."""

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self._losses = torch.zeros(config.window, dtype=torch.float64, device=device)
        self._places = torch.arange(config.window, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def limit(self) -> LossLimit:
        """The limit of the next step, from the steps before it."""
        median = _median(self._losses)
        mad = _median((self._losses - median).abs())
        spread = torch.maximum(_MAD_TO_STD * mad, _LEAST_SPREAD * median.abs())
        is_full = self._count >= len(self._places)
        return LossLimit(median, torch.where(is_full, median + self.config.z * spread, torch.inf))

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Take in the loss of a step, if it was applied."""
        was_applied = torch.isfinite(grad_norm.to(loss.device, non_blocking=True)) & torch.isfinite(loss)
        is_place = self._places == self._count % len(self._places)
        self._losses = torch.where(is_place & was_applied, loss, self._losses)
        self._count = self._count + was_applied

    def z_of(self, loss: float, median: float, limit: float) -> float:
        """How many times the spread a loss is above the median."""
        return self.config.z * (loss - median) / (limit - median)

    def load(self, losses: Iterable[float]) -> None:
        """Take up the last losses of applied steps, oldest first."""
        kept = torch.tensor(list(losses)[-len(self._places) :], dtype=torch.float64)
        self._losses = torch.zeros_like(self._losses)
        self._losses[: len(kept)] = kept.to(self._losses.device)
        self._count = torch.full_like(self._count, len(kept))


def _median(values: torch.Tensor) -> torch.Tensor:
    """Of an even number the mean of the middle two, as usual; torch.median takes the lower one."""
    ordered, middle = torch.sort(values).values, len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
