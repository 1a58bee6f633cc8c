"""What each worker uses: memory, and how busy, hot and thirsty its GPU is; as points of MLflow's system metrics."""

from __future__ import annotations

import time

import torch

from pipelines.stages.train.device import usage_of
from pipelines.stages.train.job import MetricSink

_EVERY_S = 10.0
_WORKERS_AT_ONCE = 16  # of more than these each tells less often, so that all together tell no more
_FLUSH_EVERY = 100  # points: what is not confirmed is kept in memory


class WorkerUsage:
    """Journals `system/worker3/...` of this worker at logged steps, now and then."""

    def __init__(self, journal: MetricSink, rank: int, num_workers: int, device: torch.device) -> None:
        self._journal, self._rank, self._device = journal, rank, device
        self._interval_s = _EVERY_S * max(1.0, num_workers / _WORKERS_AT_ONCE)
        self._next_at = time.monotonic()
        self._num_points = 0

    def report(self, step: int) -> None:
        """Tell it, if the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + self._interval_s
        values = {f"system/worker{self._rank}/{name}": value for name, value in usage_of(self._device).items()}
        self._journal.log_metrics(step, values)
        self._num_points += 1
        if self._rank and self._num_points % _FLUSH_EVERY == 0:  # rank 0 flushes with its curves
            self._journal.flush()
