"""Figures derived from others, for any input."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
