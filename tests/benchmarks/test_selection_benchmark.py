"""The table of selection rules: differences are taken seed by seed."""

from __future__ import annotations

import re

import pytest

from benchmarks.selection import Row, difference, table

ROWS = {
    "innovation": Row({"0": 0.5, "1": 0.9, "2": 0.7}, 100, 10),
    "random": Row({"0": 0.4, "1": 0.8, "2": 0.6}, 100, 10),
    "oracle": Row({"2": 0.9, "1": 1.0, "0": 0.8}, 100, 10),
    "recency": Row({"3": 0.1}, 100, 10),
}


def test_what_all_seeds_share_is_not_in_the_interval() -> None:
    """The accuracies differ by 0.4 between seeds, but always by 0.1 between these rules."""
    assert difference("random", ROWS) == "-0.100 (-0.100 to -0.100)"
    assert difference("innovation", ROWS) == "-"
    assert difference("recency", ROWS) == "-"  # no seed of the baseline


def test_the_interval_is_students() -> None:
    """Differences 0.3, 0.1, 0.2: mean 0.2, deviation 0.1, and t = 4.303 for two degrees of freedom."""
    value, low, high = map(float, re.findall(r"[+-][\d.]+", difference("oracle", ROWS)))
    half = 4.303 * 0.1 / 3**0.5
    assert value == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))


def test_the_best_comes_first() -> None:
    names = [line.split("|")[1].strip() for line in table(ROWS).splitlines()[2:]]
    assert names == ["oracle", "innovation", "random", "recency"]
