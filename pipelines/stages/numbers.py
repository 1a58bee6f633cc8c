"""Numbers with as many digits as their interval supports: two digits of its half width. Without an interval, four."""

from __future__ import annotations

import math
from typing import NamedTuple

MINUS = "\u2212"
_DIGITS_WITHOUT_INTERVAL = 4
_MOST_DECIMALS = 9


class Shown(NamedTuple):
    """A figure as text; `low` and `high` are empty if there is no interval."""

    value: str
    low: str = ""
    high: str = ""

    @property
    def interval(self) -> str:
        """Both ends; empty if there are none."""
        return f"{self.low} to {self.high}" if self.low else ""


def shown(value: float, low: float | None = None, high: float | None = None, signed: bool = False) -> Shown:
    """The value and its interval, rounded alike. Args: signed: with + before what is larger than 0."""
    if not math.isfinite(value):
        return Shown(_infinite(value))
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return Shown(_alone(value, signed))
    decimals = _decimals_for(max(high - value, value - low), 2)
    if decimals is None:  # the interval is a point
        return Shown(*(_alone(number, signed) for number in (value, low, high)))
    return Shown(*(_text(number, decimals, signed) for number in (value, low, high)))


def with_interval(value: float, low: float | None = None, high: float | None = None) -> str:
    """The value and its interval in one text: `1.888 ± 0.052`, or `96.3 (89.4 to 104.2)` if it is not symmetric."""
    text = shown(value, low, high)
    if not text.low or low is None or high is None or low == high:
        return text.value
    half = (high - low) / 2
    if abs((high - value) - (value - low)) < 0.02 * half:
        return f"{text.value} ± {_text(half, _decimals_for(max(high - value, value - low), 2))}"
    return f"{text.value} ({text.interval})"


def _alone(value: float, signed: bool = False) -> str:
    """Four digits, without zeros at the end."""
    text = _text(value, _decimals_for(abs(value), _DIGITS_WITHOUT_INTERVAL), signed)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _decimals_for(size: float, digits: int) -> int | None:
    """Decimals that give `size` so many digits; None of 0."""
    if not size > 0:
        return None
    # of the rounded size: 0.0996 has two digits as 0.10
    exponent = int(f"{size:.{digits - 1}e}".partition("e")[2])
    return min(digits - 1 - exponent, _MOST_DECIMALS)


def _text(number: float, decimals: int | None, signed: bool = False) -> str:
    decimals = 0 if decimals is None else decimals
    rounded = round(number, decimals) + 0.0  # no -0.0
    text = f"{abs(rounded):,.{max(decimals, 0)}f}"
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return sign + text


def _infinite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
