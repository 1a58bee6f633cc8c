"""What training curves are drawn over: steps, tokens and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.stages.sections import Points, Training

Axis = Callable[[Training, np.ndarray], np.ndarray]
"""Turns steps into what is on the x axis."""

_TOKEN_UNITS = (("billion tokens", 1e9), ("million tokens", 1e6), ("thousand tokens", 1e3), ("tokens", 1.0))
_TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Clock:
    """An x axis of training curves."""

    name: str
    x_label: str
    of: Axis


def clocks(trainings: Iterable[Training]) -> list[Clock]:
    """Steps, tokens and time, as far as they are known of all trainings."""
    known = list(trainings)
    found = [Clock("steps", "step", lambda training, steps: steps)]
    if known and all(len(training.tokens) > 1 for training in known):
        unit, size = _unit(max(training.tokens[-1][1] for training in known), _TOKEN_UNITS)
        found.append(Clock("tokens", unit, lambda training, steps: _at(training.tokens, steps) / size))
    if known and all(len(training.seconds) > 1 for training in known):
        time_unit, seconds = _unit(max(training.seconds[-1][1] for training in known), _TIME_UNITS)
        label = f"{time_unit} in optimizer steps"
        found.append(Clock("time", label, lambda training, steps: _at(training.seconds, steps) / seconds))
    return found


def _unit(largest: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    return next((unit for unit in units if largest >= 1.5 * unit[1]), units[-1])


def _at(points: Points, steps: np.ndarray) -> np.ndarray:
    known, values = np.asarray(points, dtype=np.float64).T
    return np.interp(steps, known, values)
