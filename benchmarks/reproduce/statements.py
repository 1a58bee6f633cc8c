"""Statements that a claim consists of, and the one rule by which figures decide them.

Every statement says that something is larger than a number: a difference of two sides, each a mean over trials. The
difference is taken seed by seed, as a seed gives both sides the same batches and initial values. Of the 95 % interval
over seeds (Student's): all of it above the number, the statement held; all of it below, it did not; else it is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import NamedTuple

from benchmarks.reproduce.trials import Name, Trial
from pipelines.stages.uncertainty import Estimate, replicates


class Verdict(StrEnum):
    """What figures say of a statement, or of a claim."""

    HELD = "held"
    FAILED = "did not hold"
    UNDECIDED = "undecided"
    UNKNOWN = "not run"


@dataclass(frozen=True)
class Side:
    """A figure, averaged over the trials of these names."""

    figure: str
    names: tuple[Name, ...]

    def by_seed(self, trials: Mapping[Name, Iterable[Trial]]) -> dict[str, float]:
        """The mean of each seed that all of the names have finished."""
        found: dict[str, list[float]] = {}
        for name in self.names:
            for trial in trials.get(name, ()):
                if trial.finished is not None:
                    found.setdefault(trial.seed, []).append(trial.finished.figures[self.figure])
        return {seed: fmean(values) for seed, values in found.items() if len(values) == len(self.names)}


@dataclass(frozen=True)
class Statement:
    """`left` minus `right` is larger than `above`."""

    text: str
    left: Side
    right: Side
    above: float = 0.0


class Reading(NamedTuple):
    """What figures say of a statement. `difference` is None if no seed has both sides."""

    statement: Statement
    difference: Estimate | None
    num_seeds: int
    verdict: Verdict


def read(statement: Statement, trials: Mapping[Name, Iterable[Trial]]) -> Reading:
    """Decide a statement by the trials that are finished."""
    left, right = statement.left.by_seed(trials), statement.right.by_seed(trials)
    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if not differences:
        return Reading(statement, None, 0, Verdict.UNKNOWN)
    difference = replicates(differences)
    return Reading(statement, difference, len(differences), verdict_of(difference, statement.above))


def verdict_of(difference: Estimate, above: float) -> Verdict:
    """By the whole interval; of a single seed there is none."""
    if difference.low is None or difference.high is None:
        return Verdict.UNDECIDED
    if difference.low > above:
        return Verdict.HELD
    return Verdict.FAILED if difference.high < above else Verdict.UNDECIDED


def joined(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a claim: held if all its statements are, not if one of them is not."""
    found = set(verdicts)
    for verdict in (Verdict.FAILED, Verdict.UNKNOWN, Verdict.UNDECIDED):
        if verdict in found:
            return verdict
    return Verdict.HELD
