"""Lines of one picture, at most eight: the best ones, and equal ones as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.stages.evaluate.results import Mark
from pipelines.stages.report.smoothing import XY

MAX_LINES = 8
_STEEP_SHARE = 0.25  # of the x axis
_BAND_SHARE = 0.9  # of the ends of intervals that the frame must hold


@dataclass(frozen=True, eq=False)
class Line:
    """One line. `y` may be smoothed; `faint`: what it stands for (raw points, single seeds)."""

    group: str
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    part: str = ""
    is_smoothed: bool = False
    faint: tuple[XY, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One picture of lines."""

    name: str  # of its file
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    mark: Mark | None = None
    log_x: bool = False
    is_loss: bool = False


def split(panel: Panel, ranking: Sequence[str]) -> list[Panel]:
    """Panels of at most MAX_LINES lines: of one model with all its parts, or of one part of several models."""
    parts = list(dict.fromkeys(line.part for line in panel.lines))
    if len({line.group for line in panel.lines}) == 1:
        named = tuple(replace(line, label=line.part or line.group) for line in panel.lines)
        return [_first_of(replace(panel, lines=named))]
    found = []
    for part in parts:
        lines = _joined([line for line in panel.lines if line.part == part])
        name, title = (f"{panel.name}-{_slug(part)}", f"{panel.title}: {part}") if part else (panel.name, panel.title)
        found.append(_best_of(replace(panel, name=name, title=title, lines=lines), ranking))
    return found


def _best_of(panel: Panel, ranking: Sequence[str]) -> Panel:
    if len(panel.lines) == 1 and panel.lines[0].label.startswith("all "):
        return replace(panel, note=f"{panel.note} Equal in {panel.lines[0].label}.".strip())
    if len(panel.lines) <= MAX_LINES:
        return panel
    order = {name: number for number, name in enumerate(ranking)}
    kept = sorted(panel.lines, key=lambda line: order.get(line.group, len(order)))[:MAX_LINES]
    note = f"The best {MAX_LINES} of {len(panel.lines)} models; the tables have all."
    return replace(
        panel, lines=tuple(line for line in panel.lines if line in kept), note=f"{panel.note} {note}".strip()
    )


def _first_of(panel: Panel) -> Panel:
    if len(panel.lines) <= MAX_LINES:
        return panel
    note = f"{MAX_LINES} of {len(panel.lines)} lines."
    return replace(panel, lines=panel.lines[:MAX_LINES], note=f"{panel.note} {note}".strip())


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text.lower()).strip("-") or "all"


def _joined(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Equal lines of several groups as one: schedules of learning rates mostly are."""
    found: list[list[Line]] = []
    for line in lines:
        same = next((known for known in found if _is_same(known[0], line)), None)
        if same is None:
            found.append([line])
        else:
            same.append(line)
    groups = {line.group for line in lines}
    return tuple(_one(same, len(groups)) for same in found)


def _is_same(one: Line, other: Line) -> bool:
    return np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y)


def _one(same: Sequence[Line], num_groups: int) -> Line:
    if len(same) == 1:
        return same[0]
    label = f"all {num_groups} models" if len(same) == num_groups else f"{same[0].label} and {len(same) - 1} more"
    return replace(same[0], label=label)


def band_frame(panel: Panel) -> tuple[float, float] | None:
    """The y range of lines whose bands reach far beyond at some points; None if all of them fit in."""
    lows = np.concatenate([line.low for line in panel.lines if line.low is not None] or [np.zeros(0)])
    highs = np.concatenate([line.high for line in panel.lines if line.high is not None] or [np.zeros(0)])
    if not len(lows):
        return None
    values = np.concatenate([line.y for line in panel.lines])
    low = min(float(values.min()), float(np.quantile(lows, 1 - _BAND_SHARE)))
    high = max(float(values.max()), float(np.quantile(highs, _BAND_SHARE)))
    margin = 0.1 * (high - low)
    if lows.min() >= low - margin and highs.max() <= high + margin:
        return None
    return low - margin, high + margin


def steep_from(panel: Panel) -> tuple[float, float] | None:
    """The y range of a loss without its steep beginning; None if all of it fits in."""
    if not panel.is_loss:
        return None
    first, last = min(line.x[0] for line in panel.lines), max(line.x[-1] for line in panel.lines)
    later = [line.y[line.x >= first + _STEEP_SHARE * (last - first)] for line in panel.lines]
    values = np.concatenate([y for y in later if len(y)] or [line.y for line in panel.lines])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low)
    return (low - margin, high + margin) if high > low else None
