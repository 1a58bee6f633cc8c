"""Panels of the curves of trainings and measures: a line per group of replicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pipelines.stages.evaluate.results import Curve
from pipelines.stages.report.clocks import Clock
from pipelines.stages.report.panels import Line, Panel, split
from pipelines.stages.report.smoothing import XY, mean_of, smoothed, thinned, thinned_range
from pipelines.stages.report.subjects import Group
from pipelines.stages.sections import Series, Training


def training_panels(groups: Sequence[Group], clock: Clock, ranking: Sequence[str]) -> list[Panel]:
    """Every recorded metric of the trainings. Args: ranking: groups, those to be kept first."""
    found = _Plots[tuple[Training, Series]]()
    for group in groups:
        for member in group.members:
            if (training := member.training) is not None:
                for series in training.series:
                    found.add(series.plot, series.part, group, (training, series))
    panels = []
    for plot, parts in found.items():
        lines, notes = [], dict[str, None]()
        for part, by_group in parts.items():
            for group, members in by_group:
                line = _training_line(group, part, members, clock)
                lines += [] if line is None else [line]
                notes |= dict.fromkeys(series.note for _, series in members if series.note)
        first = next(iter(parts.values()))[0][1][0][1]
        panel = Panel(
            name=plot, title=first.title, x_label=clock.x_label, y_label=first.y_label, lines=tuple(lines),
            note=" ".join(notes), is_loss=first.is_loss,
        )  # fmt: skip
        panels += split(panel, ranking)
    return panels


def curve_panels(groups: Sequence[Group], ranking: Sequence[str]) -> list[Panel]:
    """The curves of all measures."""
    found = _Plots[Curve]()
    for group in groups:
        for member in group.members:
            for measure, measured in member.measured.items():
                for curve in measured.result.curves:
                    if curve.points:
                        name = curve.name if curve.name == measure else f"{measure}-{curve.name}"
                        found.add(name, curve.part, group, curve)
    panels = []
    for name, parts in found.items():
        curves = [curve for by_group in parts.values() for _, members in by_group for curve in members]
        lines = [_curve_line(group, part, members) for part, by_group in parts.items() for group, members in by_group]
        marks = [curve.mark for curve in curves if curve.mark is not None]
        first = curves[0]
        panel = Panel(
            name=name, title=first.title, x_label=first.x_label, y_label=first.y_label, lines=tuple(lines),
            note=" ".join(dict.fromkeys(curve.note for curve in curves if curve.note)), log_x=first.log_x,
            mark=max(marks, key=lambda mark: mark.x) if marks else None,
        )  # fmt: skip
        panels += split(panel, ranking)
    return panels


Member = TypeVar("Member")


class _Plots(dict[str, dict[str, list[tuple[Group, list[Member]]]]]):
    """By plot and part: each group, with the curves of its members."""

    def add(self, plot: str, part: str, group: Group, member: Member) -> None:
        by_group = self.setdefault(plot, {}).setdefault(part, [])
        if not by_group or by_group[-1][0] is not group:
            by_group.append((group, []))
        by_group[-1][1].append(member)


def _training_line(group: Group, part: str, members: Sequence[tuple[Training, Series]], clock: Clock) -> Line | None:
    curves: list[tuple[np.ndarray, np.ndarray, bool]] = []
    for training, series in members:
        points = np.asarray([point for point in series.points if np.isfinite(point[1])], dtype=np.float64)
        if len(points):
            curves.append((clock.of(training, points[:, 0]), points[:, 1], series.is_noisy))
    if not curves:
        return None
    if len(curves) == 1:
        x, y, is_noisy = curves[0]
        smooth = smoothed(y) if is_noisy else y
        is_smoothed = smooth is not y
        faint: tuple[XY, ...] = (thinned_range(x, y),) if is_smoothed else ()
        x, y = thinned(x, smooth)
        return Line(group.name, group.short_label, x, y, part=part, is_smoothed=is_smoothed, faint=faint)
    singles = [(x, smoothed(y) if is_noisy else y) for x, y, is_noisy in curves]
    x, y = mean_of(singles)
    is_same = all(np.array_equal(y, other) for _, other in singles)
    faint = () if is_same else tuple(thinned(*single) for single in singles)
    return Line(group.name, group.short_label, *thinned(x, y), part=part, faint=faint)


def _curve_line(group: Group, part: str, curves: Sequence[Curve]) -> Line:
    singles = [
        (np.array([point.x for point in curve.points]), np.array([point.y for point in curve.points]))
        for curve in curves
    ]
    if len(singles) > 1:
        x, y = mean_of(singles)
        return Line(group.name, group.short_label, x, y, part=part, faint=tuple(singles))
    (x, y), points = singles[0], curves[0].points
    low = high = None
    if all(point.low is not None and point.high is not None for point in points):
        low = np.array([point.low for point in points], dtype=np.float64)
        high = np.array([point.high for point in points], dtype=np.float64)
    return Line(group.name, group.short_label, x, y, low, high, part=part)
