"""Lines with their labels at their ends, bands for intervals, faint raw points; no legend."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from pipelines.stages.report.drawing import COLOURS, MUTED, SMALL, Picture, new_figure, save, short, spread
from pipelines.stages.report.panels import Line, Panel, band_frame, steep_from

_HEIGHT = 2.9  # inches
_LABEL_GAP = 11.0  # points between the middles of labels
_FEW = 3  # lines: more make a crowd
_MARKED_UP_TO = 12  # points per line that are drawn as dots, too
_FEWEST_TICKS = 3
_BETWEEN_POWERS = ((1,), (1, 2, 5), (1, 2, 3, 5, 7))  # ticks of a log axis


def draw_lines(panel: Panel, colours: Mapping[str, str], with_png: bool = True) -> Picture:
    """One picture. Args: colours: by group; with one group in the panel, its parts have colours of their own."""
    is_alone = len({line.group for line in panel.lines}) == 1
    with new_figure(_HEIGHT) as (figure, axes):
        frame, bands = steep_from(panel), band_frame(panel)
        of_lines = [
            COLOURS[number] if is_alone else colours.get(line.group, MUTED) for number, line in enumerate(panel.lines)
        ]
        is_crowded = len(panel.lines) > _FEW
        for line, colour in zip(panel.lines, of_lines, strict=True):
            _draw_line(axes, line, colour, is_crowded)
        if panel.log_x:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=panel.x_label == "step"))
        if (limits := frame or bands) is not None:
            axes.set_ylim(*limits)
        elif panel.y_label.startswith("share"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(panel.x_label, fontsize=SMALL)
        axes.set_ylabel(panel.y_label, fontsize=SMALL)
        axes.grid(axis="y")
        axes.margins(x=0.01)
        if panel.mark is not None:
            _draw_mark(axes, panel.mark.x, panel.mark.label)
        if panel.log_x:
            _set_log_ticks(axes)
        _label_ends(figure, axes, panel, of_lines)
        note = panel.note
        if any(line.is_smoothed for line in panel.lines):
            note = f"{note} Smoothed by a centred mean; what was recorded is faint.".strip()
        elif any(line.faint for line in panel.lines):
            note = f"{note} Means over seeds; single seeds are faint.".strip()
        if frame is not None and any(line.y.max() > frame[1] for line in panel.lines):
            note = f"{note} The frame leaves out the steep beginning.".strip()
        if bands is not None:
            note = f"{note} Some intervals go beyond the frame.".strip()
        return save(figure, panel.name, panel.title, _alt(panel), note, with_png)


def _draw_line(axes: Axes, line: Line, colour: str, is_crowded: bool) -> None:
    for x, y in line.faint:
        axes.plot(x, y, color=colour, alpha=0.12 if is_crowded else 0.25, linewidth=0.7)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.07 if is_crowded else 0.15, linewidth=0)
    marker = "o" if len(line.x) <= _MARKED_UP_TO else ""
    axes.plot(line.x, line.y, color=colour, linewidth=1.4, marker=marker, markersize=3)


def _draw_mark(axes: Axes, x: float, label: str) -> None:
    """A dashed line with its label above the axes, where neither lines nor their labels are."""
    axes.axvline(x, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
    place, _ = axes.transAxes.inverted().transform(axes.transData.transform((x, 0.0)))
    axes.annotate(
        short(label, 30), (x, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(0, 4),
        color=MUTED, fontsize=SMALL, va="bottom", ha="right" if place > 0.5 else "left",
    )  # fmt: skip


def _set_log_ticks(axes: Axes) -> None:
    axes.set_xticks(log_ticks(*axes.get_xlim()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: powers of ten, and as many between them as a short axis needs for three.

    matplotlib's own locator labels minor ticks of short axes until they overlap.
    """
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    candidates = [np.outer(powers, between).ravel() for between in _BETWEEN_POWERS]
    for places in (*candidates, MaxNLocator(4, steps=(1, 2, 5, 10)).tick_values(low, high)):
        ticks = [float(place) for place in places if low <= place <= high]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return ticks


def _label_ends(figure: Figure, axes: Axes, panel: Panel, colours: Sequence[str]) -> None:
    """Name each line right of the axes, at the height of its end; if the label had to move, with a line to it."""
    if len(panel.lines) < 2:
        return
    rooms = [
        axes.text(1.04, 1.0, short(line.label), transform=axes.transAxes, fontsize=SMALL, va="center")
        for line in panel.lines
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.draw_without_rendering()
    for room in rooms:
        room.set_visible(False)
    figure.set_layout_engine("none")
    height = axes.bbox.height / figure.dpi * 72
    ends = [
        axes.transAxes.inverted().transform(axes.transData.transform((line.x[-1], line.y[-1]))) for line in panel.lines
    ]
    wanted = [float(np.clip(y, 0, 1)) for _, y in ends]
    places = spread(wanted, _LABEL_GAP / height)
    for line, colour, (x, _), at, y in zip(panel.lines, colours, ends, places, wanted, strict=True):
        if abs(at - y) * height > 2 or x < 0.97:
            axes.plot(
                [x, 1.03], [y, at], color=colour, alpha=0.5, linewidth=0.6, transform=axes.transAxes, clip_on=False
            )
        axes.text(
            1.04, at, short(line.label), transform=axes.transAxes, color=colour, fontsize=SMALL, va="center",
            clip_on=False,
        )  # fmt: skip


def _alt(panel: Panel) -> str:
    lines = ", ".join(line.label for line in panel.lines)
    return f"{panel.title} against {panel.x_label}: {lines}"
