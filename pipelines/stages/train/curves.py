"""The curves of a training run: every rank keeps their points, rank 0 also journals them."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.stages.train.job import History, MetricSink


class Curves:
    """Points (step, value) by the name of the metric, in the order of the steps."""

    def __init__(self, journal: MetricSink | None) -> None:
        """`journal`: where the points go as well; None on all ranks but one."""
        self.history: History = {}
        self._journal = journal

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a point of each curve; those without a value are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self.history.setdefault(name, []).append((step, value))
        if self._journal is not None:
            self._journal.log_metrics(step, known)

    def restore(self, history: History, step: int) -> None:
        """Take up the curves of the checkpoint at `step`, whose points the journal skips where it has them."""
        self.history = {}
        for name, points in history.items():
            for at, value in points:
                self.add(at, {name: value})
        if self._journal is not None:
            self._journal.log_metrics(step, {"train/resumed_from_step": step})

    def last_step(self, name: str) -> int:
        """Step of the newest point of a curve; -1 where it has none."""
        return self.history[name][-1][0] if name in self.history else -1

    def flush(self) -> None:
        """Have the journal make its points durable."""
        if self._journal is not None:
            self._journal.flush()
