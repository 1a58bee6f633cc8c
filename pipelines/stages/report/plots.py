"""The report's plots, as PNG bytes. One colour per model, the same in every plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the object interface: no global state, no display, safe in threads

Curve = Sequence[tuple[float, float]]

# Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_plot(train: Mapping[str, Curve], valid: Mapping[str, Curve]) -> bytes:
    """Training loss (line) and validation loss (points) in nats per token, against the step; by model name."""
    figure, axes = _new_figure("Loss", "step", "nats per token")
    for colour, name in zip(_colours(len(train)), train, strict=True):
        _line(axes, train[name], label=f"{name}, training", color=colour, linewidth=1, alpha=0.7)
        if valid.get(name):
            _line(axes, valid[name], label=f"{name}, validation", color=colour, marker="o", markersize=4, linewidth=1.5)
    return _png(figure, axes)


def learning_rate_plot(lr: Mapping[str, Curve]) -> bytes:
    """The schedule as it was run."""
    figure, axes = _new_figure("Learning rate", "step", "learning rate", height=2.2)
    for colour, name in zip(_colours(len(lr)), lr, strict=True):
        _line(axes, lr[name], label=name, color=colour)
    return _png(figure, axes)


def position_plot(curves: Mapping[str, Curve], seq_len: int) -> bytes:
    """Perplexity by position in the context; the dashed line marks the length seen in training."""
    figure, axes = _new_figure("Perplexity by position in the context", "position (tokens)", "perplexity")
    for colour, name in zip(_colours(len(curves)), curves, strict=True):
        _line(axes, curves[name], label=name, color=colour, marker=".", markersize=4)
    axes.axvline(seq_len, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        "training length",
        (seq_len, 0.97),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, -4),
        color="grey",
        fontsize=8,
        va="top",
    )
    return _png(figure, axes)


def bits_per_byte_plot(models: Mapping[str, float], references: Mapping[str, float]) -> bytes:
    """Bars for the models, thin grey bars for what they are compared with (gzip, the untrained model)."""
    names = [*models, *references]
    figure, axes = _new_figure(
        "Bits per byte on the validation documents (lower is better)", "bits per byte", "", 0.5 + 0.45 * len(names)
    )
    values = [*models.values(), *references.values()]
    colours = [*_colours(len(models)), *["#BBBBBB"] * len(references)]
    axes.barh(names, values, color=colours)
    axes.invert_yaxis()
    for position, value in enumerate(values):
        axes.annotate(f" {value:.3f}", (value, position), va="center", fontsize=9)
    axes.margins(x=0.12)
    return _png(figure, axes, legend=False)


def _colours(number: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(number)]


def _new_figure(title: str, x_label: str, y_label: str, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, max(height, 1.6)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, curve: Curve, **style: Any) -> None:
    axes.plot([x for x, _ in curve], [y for _, y in curve], **style)


def _png(figure: Figure, axes: Axes, legend: bool = True) -> bytes:
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
