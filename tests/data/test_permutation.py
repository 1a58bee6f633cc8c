"""The keyed permutation: every value once, every key another order, and no pattern that a chi-square test finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import Permutation

SIGMAS = 5


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**31), st.integers(0, 9)))
def test_each_value_once(size: int, key: tuple[int, int]) -> None:
    assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(2, 2**60), position=st.integers(0, 2**60))
def test_a_value_is_the_same_alone_and_among_others(size: int, position: int) -> None:
    positions = np.array([position % size, 0, size - 1])
    together = Permutation(size, (1,))(positions)
    assert ((together >= 0) & (together < size)).all()
    assert [int(Permutation(size, (1,))(positions[i : i + 1])[0]) for i in range(3)] == together.tolist()


def test_the_order_never_changes() -> None:
    """Runs resume in the middle of it: a change loses the place of every run there is."""
    assert Permutation(10, (0, 0))(np.arange(10)).tolist() == FIRST
    assert Permutation(10**9, (7, 1, 2))(np.arange(4)).tolist() == LARGE


FIRST = [6, 5, 1, 0, 2, 3, 8, 4, 7, 9]
LARGE = [302519845, 855319319, 274639531, 938294869]


@pytest.mark.ci
@pytest.mark.parametrize("size", [7, 64, 100, 1000])
def test_over_many_keys_each_value_comes_at_each_position_equally_often(size: int) -> None:
    num_keys = 4000
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), Permutation(size, (key,))(np.arange(size))] += 1
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2  # rows and columns of a permutation table add up
    assert abs(chi_square - freedom) < SIGMAS * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1000, 2**16, 10**5])
def test_neighbours_are_spread_as_by_chance(size: int) -> None:
    values = Permutation(size, (3,))(np.arange(size)).astype(float)
    steps = np.diff(values)
    correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(correlation) < SIGMAS / np.sqrt(size)
    assert abs((steps > 0).mean() - 0.5) < SIGMAS / np.sqrt(12 * size) * 2
    bins = np.histogram(values[: size // 10], 10)[0]  # the first tenth comes from everywhere
    expected = size / 100
    assert ((bins - expected) ** 2 / expected).sum() < 9 + SIGMAS * np.sqrt(18)
