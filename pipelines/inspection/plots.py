"""The pictures of an inspection: scores and kept tokens along the text, attention by layer, the text of one layer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmojo.inspection import MEMORIES, LayerInspection
from pipelines.inspection.text import shown_at

MEMORY_COLOURS = ("#56B4E9", "#E69F00", "#D55E00")  # window, fading, eidetic; told apart by colour-blind readers
KEPT_COLOUR = "#0B3C6F"
COLUMNS, MAX_LINES = 104, 26  # of the strip of text


def overview_png(layers: Sequence[LayerInspection], pieces: Sequence[str], window_size: int) -> bytes:
    """All in one picture, for MLflow and for slides."""
    scored = [layer for layer in layers if layer.innovation_t is not None]
    lines = strip_lines(pieces)[:MAX_LINES]
    heights = [1.25] * len(scored) + [0.5 + 0.28 * len(layers)] + ([0.55 + 0.2 * len(lines)] if scored else [])
    figure = Figure(figsize=(11, sum(heights) + 0.45 * len(heights)), dpi=110, layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, layer in zip(axes, scored, strict=False):
        draw_scores(axis, layer, window_size)
    draw_mass(axes[len(scored)], layers)
    if scored:
        draw_strip(axes[-1], most_eidetic(scored), pieces, lines)
    return _png(figure)


def scores_png(layer: LayerInspection, window_size: int) -> bytes:
    """Score curve of one layer."""
    figure = Figure(figsize=(11, 1.7), dpi=110, layout="constrained")
    draw_scores(figure.add_subplot(), layer, window_size)
    return _png(figure)


def rules_png(layer: LayerInspection, window_size: int) -> bytes:
    """What each rule would hold at the end, one below the other."""
    figure = Figure(figsize=(11, 0.8 + 0.26 * len(layer.rules)), dpi=110, layout="constrained")
    draw_rules(figure.add_subplot(), layer, window_size)
    return _png(figure)


def mass_png(layers: Sequence[LayerInspection]) -> bytes:
    """Attention by layer."""
    figure = Figure(figsize=(11, 0.9 + 0.3 * len(layers)), dpi=110, layout="constrained")
    draw_mass(figure.add_subplot(), layers)
    return _png(figure)


def most_eidetic(layers: Sequence[LayerInspection]) -> LayerInspection:
    """The layer that reads its eidetic memory most."""
    return max(layers, key=lambda layer: layer.mean_mass[2])


def draw_scores(axes: Axes, layer: LayerInspection, window_size: int) -> None:
    """Innovation score against position; dots are the tokens held at the end."""
    assert layer.innovation_t is not None
    score = layer.innovation_t.tolist()
    axes.plot(score, color="#8A8A8A", linewidth=0.7)
    kept = [token.position for token in layer.kept_at_end]
    axes.plot(
        kept, [score[position] for position in kept], "o", color=KEPT_COLOUR, markersize=3.5, label="kept at the end"
    )
    axes.axvspan(len(score) - window_size, len(score), color=MEMORY_COLOURS[0], alpha=0.15, linewidth=0, label="window")
    axes.set_xlim(0, len(score))
    axes.set_ylim(bottom=0)
    axes.set_title(f"Layer {layer.layer}: innovation score by position (tokens)", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="upper right", ncols=2, bbox_to_anchor=(1, 1.28))
    _plain(axes)


def draw_rules(axes: Axes, layer: LayerInspection, window_size: int) -> None:
    """A line per rule, with a stroke for each token that it would hold at the end."""
    num_tokens = len(layer.mass_t3)
    for row, rule in enumerate(layer.rules):
        colour = KEPT_COLOUR if row == 0 else "#8A8A8A"
        axes.plot(rule.positions, [row] * len(rule.positions), "|", color=colour, markersize=9, markeredgewidth=1.4)
    axes.axvspan(num_tokens - window_size, num_tokens, color=MEMORY_COLOURS[0], alpha=0.15, linewidth=0)
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(len(layer.rules) - 0.5, -0.5)
    axes.set_yticks(range(len(layer.rules)), [rule.label for rule in layer.rules])
    title = f"Layer {layer.layer}: tokens held at the end by each rule, by position (blue: the model's own rule)"
    axes.set_title(title, fontsize=9, loc="left")
    _plain(axes)


def draw_mass(axes: Axes, layers: Sequence[LayerInspection]) -> None:
    """Stacked bars: the share of attention that each memory gets, over the second half of the text."""
    names = [f"layer {layer.layer} ({layer.mixer})" for layer in layers]
    left = [0.0] * len(layers)
    for index, (memory, colour) in enumerate(zip(MEMORIES, MEMORY_COLOURS, strict=True)):
        share = [layer.mean_mass[index] for layer in layers]
        axes.barh(names, share, left=left, color=colour, label=memory, height=0.7)
        for row, (start, width) in enumerate(zip(left, share, strict=True)):
            if width > 0.06:
                axes.annotate(f"{width:.0%}", (start + width / 2, row), ha="center", va="center", fontsize=7)
        left = [start + width for start, width in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("Attention by layer, mean over the second half of the text", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    _plain(axes)


def strip_lines(pieces: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """The text wrapped into lines of (token, column, text)."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for token, piece in enumerate(pieces):
        for part in piece.replace("\t", "    ").replace("\r", "").splitlines(keepends=True) or [""]:
            shown = part.replace("\n", "↵")
            while shown:
                if column == COLUMNS:
                    lines.append([])
                    column = 0
                room = shown[: COLUMNS - column]
                lines[-1].append((token, column, room))
                column += len(room)
                shown = shown[len(room) :]
            if part.endswith("\n"):
                lines.append([])
                column = 0
    return [line for line in lines if line]


def draw_strip(
    axes: Axes, layer: LayerInspection, pieces: Sequence[str], lines: Sequence[Sequence[tuple[int, int, str]]]
) -> None:
    """The beginning of the text: the darker, the more surprising; blue is held at the end."""
    assert layer.innovation_t is not None
    rank = ranks(layer.innovation_t).tolist()
    places = shown_at(pieces)
    kept = {places[token.position] for token in layer.kept_at_end}
    for row, line in enumerate(lines):
        for token, column, text in line:
            colour = KEPT_COLOUR if token in kept else (1, 1 - 0.35 * rank[token] ** 2, 1 - 0.75 * rank[token] ** 2)
            axes.add_patch(Rectangle((column, row), len(text), 0.94, color=colour, linewidth=0))
            for offset, character in enumerate(text):
                axes.text(
                    column + offset + 0.5, row + 0.5, character.replace("$", r"\$"), family="monospace", fontsize=9,
                    ha="center", va="center", color="white" if token in kept else "#1a1a1a",
                )  # fmt: skip
    last = lines[-1][-1][0] + 1 if lines and lines[-1] else 0
    cut = "" if last >= len(pieces) else f", its first {last} of {len(pieces)} tokens"
    axes.set_title(f"The text in layer {layer.layer}{cut} (blue: kept at the end)", fontsize=9, loc="left")
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(max(1, len(lines)), 0)
    axes.axis("off")


def ranks(score_t: torch.Tensor) -> torch.Tensor:
    """Each score's share of the others that it exceeds, from 0 to 1."""
    return score_t.argsort().argsort() / max(1, score_t.shape[0] - 1)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # characters the font has not show as boxes
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
