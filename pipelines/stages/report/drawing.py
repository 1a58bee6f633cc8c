"""What all plots of a report share: size, colours, and how a figure becomes SVG and PNG.

Plots are small, so that their letters can be read on a phone; a wide page puts two beside each other.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the object interface: no display, no figures left behind

# Okabe and Ito's palette, which colour-blind readers tell apart, with two for its yellow and black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
INK, MUTED, GRID, PAPER = "#1b1b1f", "#75757f", "#dcdce3", "#ffffff"
WIDTH = 4.7  # inches
FONT = 9.0  # points
SMALL = 8.0
_SETTINGS = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "bmojo",  # the same plot has the same bytes
    "font.size": FONT,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": FONT + 1,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-3, 6),
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Picture:
    """A plot in two formats, with what stands around it."""

    name: str  # of its files
    title: str
    alt: str
    svg: str
    png: bytes
    note: str = ""


@contextmanager
def new_figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes. Args: height: inches."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def save(figure: Figure, name: str, title: str, alt: str, note: str = "", with_png: bool = True) -> Picture:
    """The figure as a picture; inside new_figure."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    png = io.BytesIO()
    if with_png:
        figure.savefig(png, format="png", dpi=150)
    return Picture(name, title, alt, svg.getvalue(), png.getvalue(), note)


def short(text: str, length: int = 22) -> str:
    """The text, its middle left out if it is longer; without what matplotlib would take for mathematics."""
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    return text.replace("$", r"\$")


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places for labels: at least `gap` apart within low to high, as near as possible to where they are wanted.

    The least squares solution, by pooling neighbours. If there is no room for all, they stand closer.
    """
    order = np.argsort(wanted, kind="stable")
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    pools: list[list[float]] = []  # mean, number
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, number), (before, others) = pools.pop(), pools.pop()
            pools.append([(mean * number + before * others) / (number + others), number + others])
    places = np.concatenate([np.full(int(number), mean) for mean, number in pools]) if pools else np.zeros(0)
    places = np.clip(places, low, high - (len(wanted) - 1) * gap) + gap * np.arange(len(wanted))
    found = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        found[index] = float(places[rank])
    return found
