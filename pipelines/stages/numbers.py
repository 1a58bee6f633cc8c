"""Figures derived from others, and how they are shown, for any input."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def optional(value: float | None, form: str) -> str:
    """The value in a form such as `{:.2f}`; `-` if there is none."""
    return "-" if value is None else form.format(value)
