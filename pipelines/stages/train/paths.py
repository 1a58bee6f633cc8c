"""The path that each operator takes in training, and why, shown with the run."""

from __future__ import annotations

from kernels.operator import ran
from pipelines.stages.train.job import MetricSink

TAG = "bmojo.path."  # then the operator's name


class OperatorPaths:
    """Journals one tag per operator, for example `bmojo.path.linear` = `cpp: float32 or float64 on the CPU`.

    Tags, not parameters: a resume on another machine may take other paths, and MLflow's parameters never change.
    """

    def __init__(self, journal: MetricSink | None) -> None:
        """`journal`: where the tags go; None on all ranks but one."""
        self._journal = journal
        self._told: dict[str, str] = {}

    def report(self) -> None:
        """Journal what is new since the last call. In validation an operator may take another path than in training."""
        if self._journal is None:
            return
        tags: dict[str, str] = {}
        for operator, path, reason in ran():
            before = tags.get(TAG + operator)
            tags[TAG + operator] = f"{before}; {path}: {reason}" if before else f"{path}: {reason}"
        new = {name: text for name, text in tags.items() if self._told.get(name) != text}
        if new:
            self._journal.log_tags(new)
            self._told |= new
