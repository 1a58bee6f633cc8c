"""A dot and an interval per model, on an axis that shows what differs: figures, and differences to a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipelines.stages.numbers import shown
from pipelines.stages.report.comparison import Column
from pipelines.stages.report.drawing import COLOURS, INK, MUTED, SMALL, Picture, new_figure, save, short
from pipelines.stages.uncertainty import Estimate

_ROW = 0.24  # inches
_AROUND = 0.95
_BETTER, _WORSE = COLOURS[2], COLOURS[1]


class _Row(NamedTuple):
    name: str
    estimate: Estimate
    each: tuple[float, ...]
    colour: str


def draw_values(column: Column, labels: Mapping[str, str], baseline: str) -> Picture:
    """The figure of each group with its interval, the best on top. Args: labels: by group."""
    rows = [
        _Row(
            labels[name], column.cells[name].estimate, column.cells[name].each, INK if name == baseline else COLOURS[0]
        )
        for name in column.ranked()
    ]
    title = f"{column.title} ({column.figure.better} is better)"
    with new_figure(_AROUND + _ROW * len(rows)) as (figure, axes):
        _draw_rows(axes, rows)
        outside = _references(axes, column)
        axes.set_xlabel(column.figure.unit, fontsize=SMALL)
        note = f"Outside the frame: {', '.join(outside)}." if outside else ""
        alt = f"{title}: " + ", ".join(f"{row.name} {shown(*row.estimate).value}" for row in rows)
        return save(figure, _file(column), title, alt, note)


def draw_differences(column: Column, labels: Mapping[str, str], baseline: str) -> Picture | None:
    """The difference of each group to the baseline; None if there is none to draw."""
    rows = [
        _Row(labels[name], delta, (), _verdict_colour(column, delta))
        for name in column.ranked()
        if (delta := column.cells[name].delta) is not None
    ]
    if not rows:
        return None
    title = f"{column.title}: difference to {labels[baseline]}"
    with new_figure(_AROUND + _ROW * len(rows)) as (figure, axes):
        _draw_rows(axes, rows)
        axes.axvline(0, color=INK, linewidth=0.9)
        direction = "left" if column.figure.better == "lower" else "right"
        unit = f"{column.figure.unit}, " if column.figure.unit else ""
        axes.set_xlabel(f"{unit}better to the {direction}", fontsize=SMALL)
        alt = f"{title}: " + ", ".join(f"{row.name} {shown(*row.estimate, signed=True).value}" for row in rows)
        return save(figure, f"{_file(column)}-difference", title, alt)


def _draw_rows(axes: Axes, rows: list[_Row]) -> None:
    for number, row in enumerate(rows):
        value, low, high = row.estimate
        if low is not None and high is not None:
            axes.plot([low, high], [number, number], color=row.colour, linewidth=1.6, alpha=0.75, solid_capstyle="butt")
        axes.plot(row.each, [number] * len(row.each), "|", color=row.colour, markersize=7, alpha=0.5)
        axes.plot([value], [number], "o", color=row.colour, markersize=5)
    axes.set_yticks(range(len(rows)), [short(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.06)


def _references(axes: Axes, column: Column) -> list[str]:
    """Draw those near the models as faint lines; say which others there are."""
    low, high = axes.get_xlim()
    near, outside = [], []
    for reference in column.references:
        values = reference.values
        if len(values) == 1 and low - (high - low) / 2 <= values[0] <= high + (high - low) / 2:
            near.append(reference)
        else:
            ends = [shown(value).value for value in (min(values), max(values))]
            outside.append(f"{reference.name} {' to '.join(dict.fromkeys(ends))}")
    for reference in near:
        axes.axvline(reference.values[0], color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate(
            reference.name, (reference.values[0], 1.0), xycoords=("data", "axes fraction"), color=MUTED,
            fontsize=SMALL, ha="center", va="bottom",
        )  # fmt: skip
    return outside


def _verdict_colour(column: Column, delta: Estimate) -> str:
    if delta.low is None or delta.high is None or delta.low <= 0 <= delta.high:
        return MUTED
    return _BETTER if (delta.value < 0) == (column.figure.better == "lower") else _WORSE


def _file(column: Column) -> str:
    return f"{column.measure}-{column.figure.name}".replace("/", "-")
