"""Figures of a claim's trials over their seeds, and their plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from benchmarks.reproduce.claims import Claim
from benchmarks.reproduce.trials import Name, Trial
from pipelines.stages.evaluate.results import CurvePoint
from pipelines.stages.report.drawing import COLOURS, INK, MUTED, SMALL, new_figure
from pipelines.stages.uncertainty import Estimate, replicates

_WIDTH, _HEIGHT = 6.4, 3.4  # inches
_SPREAD = 0.6  # of the distance between places, over which rows are set apart
_WORDS = 24  # letters of all places together, beyond which their names are slanted
_MARKERS = "osDv^<>PX*"
_MARGIN = 0.04  # below and above shares

Trials = Mapping[Name, Sequence[Trial]]


class _Series(NamedTuple):
    label: str
    estimates: Sequence[Estimate | None]  # by place


def estimate(trials: Iterable[Trial], figure: str) -> Estimate | None:
    """A figure over the seeds that are finished; None: none is."""
    values = [trial.finished.figures[figure] for trial in trials if trial.finished is not None]
    return replicates(values) if values else None


def draw(claim: Claim, trials: Trials, path: Path) -> bool:
    """Write the plot of a claim. Returns False if there is nothing to draw: an earlier one is deleted then."""
    path.unlink(missing_ok=True)
    with new_figure(_HEIGHT) as (figure, axes):
        figure.set_size_inches(_WIDTH, _HEIGHT)
        drawn = _draw_curves(axes, claim, trials) if claim.plot.over == "curve" else _draw_series(axes, claim, trials)
        if not drawn:
            return False
        axes.set_xlabel(claim.plot.x_label, fontsize=SMALL)
        axes.set_ylabel(claim.plot.y_label, fontsize=SMALL)
        axes.grid(axis="y")
        if claim.plot.is_share:
            axes.set_ylim(-_MARGIN, 1 + _MARGIN)
        if drawn > 1:
            figure.legend(fontsize=SMALL - 1, frameon=False, loc="outside right upper")
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    return True


def by_half_octave(points: Iterable[CurvePoint]) -> dict[float, float]:
    """Geometric means over x in (2^(k/2), 2^((k+1)/2)], by the last x of each: equal steps crowd a logarithmic axis."""
    groups: dict[int, list[CurvePoint]] = {}
    for point in points:
        groups.setdefault(ceil(2 * log2(point.x)), []).append(point)
    return {group[-1].x: geometric_mean(point.y for point in group) for _, group in sorted(groups.items())}


def _draw_series(axes: Axes, claim: Claim, trials: Trials) -> int:
    columns, rows = claim.columns, claim.rows
    table = [[estimate(trials.get((*column.first, row), ()), column.figure) for column in columns] for row in rows]
    if claim.plot.over == "rows":
        places = list(rows)
        series = [_Series(column.title, [row[number] for row in table]) for number, column in enumerate(columns)]
    else:
        first = 1 if claim.plot.is_ordered else 0  # the mean of all has no place among them
        places = [column.title for column in columns[first:]]
        series = [_Series(row, found[first:]) for row, found in zip(rows, table, strict=True)]
    series = [one for one in series if any(estimate is not None for estimate in one.estimates)]
    for number, one in enumerate(series):
        shift = 0.0 if len(series) == 1 else _SPREAD * (number / (len(series) - 1) - 0.5)
        _draw_one(axes, one, number, shift / 4 if claim.plot.is_ordered else shift, claim.plot.is_ordered)
    slanted = len(" ".join(places)) > _WORDS
    axes.set_xticks(range(len(places)), places, rotation=35 if slanted else 0, ha="right" if slanted else "center")
    return len(series)


def _draw_one(axes: Axes, series: _Series, number: int, shift: float, with_line: bool) -> None:
    colour = (*COLOURS, INK, MUTED)[number % (len(COLOURS) + 2)]
    known = [(place + shift, found) for place, found in enumerate(series.estimates) if found is not None]
    for x, found in known:
        if found.low is not None and found.high is not None:
            axes.plot([x, x], [found.low, found.high], color=colour, linewidth=1.2, alpha=0.6)
    axes.plot(
        [x for x, _ in known], [found.value for _, found in known], color=colour, marker=_MARKERS[number % 10],
        markersize=4, linewidth=1.0 if with_line else 0.0, label=series.label,
    )  # fmt: skip


def _draw_curves(axes: Axes, claim: Claim, trials: Trials) -> int:
    drawn = 0
    for number, row in enumerate(claim.rows):
        curves = [
            curve
            for trial in trials.get((row,), ())
            if trial.finished is not None and (curve := trial.finished.curves.get(claim.plot.curve)) is not None
        ]
        if not curves:
            continue
        means = [by_half_octave(curve.points) for curve in curves]
        x = list(means[0])
        y = [geometric_mean(one[place] for one in means) for place in x]
        axes.plot(x, y, color=COLOURS[number], linewidth=1.2, marker=_MARKERS[number], markersize=3, label=row)
        drawn += 1
        if number == 0 and curves[0].mark is not None:
            axes.axvline(curves[0].mark.x, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
    if drawn:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_minor_locator(NullLocator())
    return drawn
