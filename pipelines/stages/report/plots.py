"""The report's plots, as PNG bytes. One colour per subject, the same in every plot."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the object interface: no global state, no display, safe in threads

from pipelines.stages.sections import BarPlot, LinePlot, Plot

# Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(shares: Mapping[str, Plot], colours: Mapping[str, str]) -> bytes:
    """Draw the shares of one picture. Args: shares, colours: by subject.

    Raises: TypeError: the shares are of different kinds, or of one that is not known here.
    """
    lines = {subject: plot for subject, plot in shares.items() if isinstance(plot, LinePlot)}
    bars = {subject: plot for subject, plot in shares.items() if isinstance(plot, BarPlot)}
    if len(lines) == len(shares):
        return _draw_lines(lines, colours)
    if len(bars) == len(shares):
        return _draw_bars(bars, colours)
    raise TypeError(f"{next(iter(shares.values())).file}: found {shares}, expected plots of one kind.")


def colours_of(subjects: list[str]) -> dict[str, str]:
    """A colour for each subject."""
    return {subject: COLOURS[index % len(COLOURS)] for index, subject in enumerate(subjects)}


def _draw_lines(shares: Mapping[str, LinePlot], colours: Mapping[str, str]) -> bytes:
    first = next(iter(shares.values()))
    figure, axes = _new_figure(first, first.height)
    for subject, plot in shares.items():
        for line in plot.lines:
            if line.points:
                label = f"{subject}, {line.part}" if line.part else subject
                x, y = zip(*line.points, strict=True)
                axes.plot(x, y, label=label, color=colours[subject], **line.style)
    if marks := [plot.mark for plot in shares.values() if plot.mark]:
        _mark(axes, *max(marks))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _mark(axes: Axes, x: float, label: str) -> None:
    axes.axvline(x, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        label,
        (x, 0.97),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, -4),
        color="grey",
        fontsize=8,
        va="top",
    )


def _draw_bars(shares: Mapping[str, BarPlot], colours: Mapping[str, str]) -> bytes:
    bars = [(subject, plot.value, colours[subject]) for subject, plot in shares.items()]
    references: dict[str, float] = {}
    for subject, plot in shares.items():
        references |= plot.references
        references |= {
            f"{subject}, {name}" if len(shares) > 1 else name: value for name, value in plot.own_references.items()
        }
    bars += [(name, value, "#BBBBBB") for name, value in references.items()]
    names, values, fills = zip(*bars, strict=True)
    figure, axes = _new_figure(next(iter(shares.values())), 0.5 + 0.45 * len(bars))
    axes.barh(names, values, color=fills)
    axes.invert_yaxis()
    for position, value in enumerate(values):
        axes.annotate(f" {value:.3f}", (value, position), va="center", fontsize=9)
    axes.margins(x=0.12)
    return _png(figure)


def _new_figure(plot: Plot, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, max(height, 1.6)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(plot.title, fontsize=11, loc="left")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
