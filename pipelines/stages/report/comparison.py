"""Figures of models side by side: each with its interval, its difference to a baseline, and whether one is best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipelines.stages.evaluate.results import Figure
from pipelines.stages.report.subjects import Group, Measured
from pipelines.stages.report.units import Units, read_units
from pipelines.stages.uncertainty import Estimate, difference_of_means, paired_difference, replicates


@dataclass(frozen=True)
class Cell:
    """A figure of one group. `each`: of its single seeds. `delta`: to the baseline; None: no comparison is valid."""

    estimate: Estimate
    each: tuple[float, ...] = ()
    delta: Estimate | None = None


@dataclass(frozen=True)
class Reference:
    """What is no model of the comparison, in the unit of a figure: gzip, untrained models."""

    name: str
    values: tuple[float, ...]  # one per model, if they differ


@dataclass(frozen=True)
class Column:
    """One figure of all groups."""

    measure: str
    title: str
    figure: Figure  # of the first that has it: name, unit, what is better
    num_units: Mapping[str, tuple[int, str]]  # by group: how many of what
    cells: Mapping[str, Cell]  # by the group's name
    best: str | None = None  # the group that is better than every other, by the intervals of the differences
    tied: tuple[str, ...] = ()  # those that cannot be told apart from the group with the best value
    problems: tuple[str, ...] = ()  # why groups are not compared
    references: tuple[Reference, ...] = ()

    @property
    def key(self) -> str:
        """`text/loss`."""
        return f"{self.measure}/{self.figure.name}"

    def ranked(self) -> list[str]:
        """Groups, the best value first; without those whose value is not a number."""
        known = {name: cell.estimate.value for name, cell in self.cells.items() if not np.isnan(cell.estimate.value)}
        return sorted(known, key=lambda name: known[name], reverse=self.figure.better == "higher")


class _Pair(NamedTuple):
    delta: Estimate | None
    problem: str = ""


def compare(groups: Sequence[Group], baseline: str) -> list[Column]:
    """Every figure of every measure, in the order in which the models have them. Args: baseline: name of a group."""
    columns: dict[tuple[str, str], Figure] = {}
    for group in groups:
        for member in group.members:
            for name, measured in member.measured.items():
                for figure in measured.result.figures:
                    columns.setdefault((name, figure.name), figure)
    names = Counter(name for _, name in columns)
    found = []
    for (measure, name), figure in columns.items():
        title = (name if names[name] == 1 else f"{measure}: {name}").replace("_", " ")
        found.append(_column(groups, baseline, measure, title, figure))
    return found


def _column(groups: Sequence[Group], baseline: str, measure: str, title: str, figure: Figure) -> Column:
    found = {group.name: one for group in groups if (one := _Figures.of(group, measure, figure.name)) is not None}
    base = found.get(baseline)
    problems: list[str] = []
    cells = {}
    for name, figures in found.items():
        delta: Estimate | None = None
        if base is not None and name != baseline:
            delta, problem = figures.minus(base)
            if problem:
                problems.append(f"{figures.group.label}: {problem}")
        each = tuple(one.value for one in figures.figures) if len(figures.figures) > 1 else ()
        cells[name] = Cell(figures.estimate, each, delta)
    column = Column(
        measure=measure,
        title=title,
        figure=figure,
        num_units={
            name: (one.measured[0].result.num_units, one.measured[0].result.unit) for name, one in found.items()
        },
        cells=cells,
        problems=tuple(problems),
        references=_references(groups, measure, figure.unit) if figure.is_main else (),
    )
    tied = _tied(column, found)
    best = column.ranked()[0] if tied == () and len(found) > 1 else None
    return replace(column, best=best, tied=tied or ())


@dataclass(frozen=True)
class _Figures:
    """One figure of all members of a group."""

    group: Group
    figures: tuple[Figure, ...]
    measured: tuple[Measured, ...]

    @classmethod
    def of(cls, group: Group, measure: str, name: str) -> _Figures | None:
        measured = [member.measured.get(measure) for member in group.members]
        pairs = [(one.result.figure(name), one) for one in measured if one is not None]
        known = [(figure, one) for figure, one in pairs if figure is not None]
        if len(known) != len(group.members):
            return None
        figures, of_measures = zip(*known, strict=True)
        return cls(group, figures, of_measures)

    @property
    def estimate(self) -> Estimate:
        if len(self.figures) > 1:
            return replicates([figure.value for figure in self.figures], self.figures[0].transform)
        (figure,) = self.figures
        return Estimate(figure.value, figure.low, figure.high)

    def minus(self, other: _Figures) -> _Pair:
        """The difference of two groups: over units of both if each is one model, else over seeds.

        By seed, if both have the same ones: a seed gives all models the same batches.
        """
        if len(self.figures) > 1 or len(other.figures) > 1:
            if self.identities != other.identities:
                return _Pair(None, _other_units(self, other))
            ours, theirs = self.by_seed, other.by_seed
            if ours.keys() == theirs.keys():
                return _Pair(replicates([ours[seed] - theirs[seed] for seed in ours]))
            return _Pair(difference_of_means([*ours.values()], [*theirs.values()]))
        of_ours, of_theirs = self.units, other.units
        if of_ours is None or of_theirs is None:
            return _Pair(None)  # the measure keeps no units
        if of_ours.identity != of_theirs.identity:
            return _Pair(None, _other_units(self, other))
        return _Pair(paired_difference(of_ours.ratio, of_theirs.ratio, self.figures[0].transform))

    @property
    def by_seed(self) -> dict[int | None, float]:
        """A value per seed, which no two members of a group share."""
        seeds = [member.training.seed if member.training else None for member in self.group.members]
        return {seed: figure.value for seed, figure in zip(seeds, self.figures, strict=True)}

    @property
    def identities(self) -> set[str]:
        return {units.identity for n in range(len(self.figures)) if (units := self._units(n)) is not None}

    @property
    def units(self) -> Units | None:
        return self._units(0)

    def _units(self, member: int) -> Units | None:
        measured, name = self.measured[member], self.figures[member].name
        if measured.result.units is None or measured.artifact is None:
            return None
        return read_units(measured.artifact.fetch(measured.result.units), name)


def _other_units(ours: _Figures, theirs: _Figures) -> str:
    unit = ours.measured[0].result.unit
    return (
        f"measured on other {unit}s than {theirs.group.label} (another validation split, or other examples), so the "
        "two are not compared"
    )


def _tied(column: Column, found: Mapping[str, _Figures]) -> tuple[str, ...] | None:
    """The groups whose difference to the best value is within its interval; None if that cannot be said of all."""
    ranked = column.ranked()
    if len(ranked) < len(column.cells):
        return None
    tied = []
    for other in ranked[1:]:
        delta, _ = found[ranked[0]].minus(found[other])
        if delta is None or delta.low is None or delta.high is None:
            return None
        if delta.low <= 0 <= delta.high:
            tied.append(other)
    return tuple(tied)


def _references(groups: Sequence[Group], measure: str, unit: str) -> tuple[Reference, ...]:
    values: dict[str, list[float]] = {}
    for group in groups:
        for member in group.members:
            if (measured := member.measured.get(measure)) is not None:
                for reference in measured.result.references:
                    if reference.unit == unit:
                        values.setdefault(reference.name, []).append(reference.value)
    return tuple(Reference(name, tuple(dict.fromkeys(found))) for name, found in values.items())
