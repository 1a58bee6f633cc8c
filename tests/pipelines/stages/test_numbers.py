"""Numbers keep the digits that their interval supports, and lose no others."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.stages.numbers import MINUS, shown, with_interval

SIZES = st.floats(1e-6, 1e9)


def number(text: str) -> float:
    return float(text.replace(MINUS, "-").replace(",", ""))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (4.6983, 4.6571, 4.7396, ("4.698", "4.657", "4.740")),
        (109.76, 98.2, 123.1, ("110", "98", "123")),
        (1.94213, 1.94111, 1.94316, ("1.9421", "1.9411", "1.9432")),
        (12_345.6, 11_667.0, 13_024.2, ("12,350", "11,670", "13,020")),
        (0.0, -0.0996, 0.0996, ("0.00", f"{MINUS}0.10", "0.10")),
        (3.21, None, None, ("3.21", "", "")),
        (0.5, 0.5, 0.5, ("0.5", "0.5", "0.5")),
        (math.inf, None, None, ("∞", "", "")),
        (math.nan, 1.0, 2.0, ("NaN", "", "")),
        (0.0, None, None, ("0", "", "")),
        (1234567.0, None, None, ("1,235,000", "", "")),
    ],
)
def test_by_hand(value: float, low: float | None, high: float | None, expected: tuple[str, str, str]) -> None:
    assert tuple(shown(value, low, high)) == expected


def test_a_difference_has_its_sign() -> None:
    assert tuple(shown(0.057, 0.040, 0.074, signed=True)) == ("+0.057", "+0.040", "+0.074")
    assert tuple(shown(-0.0, -0.5, 0.5, signed=True)) == ("0.00", f"{MINUS}0.50", "+0.50")


@given(st.floats(-1e9, 1e9), SIZES)
def test_rounding_moves_a_value_by_less_than_a_tenth_of_its_interval(value: float, half: float) -> None:
    text = shown(value, value - half, value + half)
    assert abs(number(text.value) - value) <= 0.0501 * half + 1e-9 * abs(value)
    assert number(text.low) <= number(text.value) <= number(text.high)


@given(SIZES)
def test_without_an_interval_there_are_four_digits(value: float) -> None:
    assert number(shown(value).value) == pytest.approx(value, rel=5.1e-4)


def test_in_one_text_a_symmetric_interval_is_its_half_width() -> None:
    assert with_interval(1.888, 1.836, 1.940) == "1.888 ± 0.052"
    assert with_interval(96.3, 89.4, 104.2) == "96.3 (89.4 to 104.2)"
    assert with_interval(0.75) == with_interval(0.75, 0.75, 0.75) == "0.75"
    assert with_interval(math.nan, 1.0, 2.0) == "NaN"
