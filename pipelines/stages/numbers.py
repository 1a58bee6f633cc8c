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


def with_interval(value: float, low: float | None, high: float | None) -> str:
    """The value with the ends of its interval, as many digits as it is sure of: `1.888 ± 0.052`, `96.3 (89.4 to 104)`.

    Without an interval it has four digits.
    """
    if low is None or high is None or not all(map(math.isfinite, (value, low, high))) or low == high:
        return f"{value:.4g}"
    half = (high - low) / 2
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if abs((high - value) - (value - low)) < 0.02 * half:
        return f"{value:.{decimals}f} \u00b1 {half:.{decimals}f}"
    return f"{value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"
