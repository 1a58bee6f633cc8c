"""Mixtures: exact shares in whole slots, the same counts however they are asked for."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import Mixture, Phase, shares_of

parts = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)


def phase(start: int, weights: list[int]) -> Phase:
    return Phase(start, tuple(Fraction(weight, sum(weights)) for weight in weights))


@settings(deadline=None)
@given(weights=parts)
def test_after_any_number_of_positions_each_source_has_its_share_to_less_than_a_sample(weights: list[int]) -> None:
    mixture = Mixture([phase(0, weights)])
    sources, _ = mixture.at(np.arange(3 * sum(weights)))
    for source, weight in enumerate(weights):
        counts = accumulate((sources == source).astype(int).tolist())
        for num_positions, count in enumerate(counts, 1):
            assert abs(count - Fraction(num_positions * weight, sum(weights))) < 1


@settings(deadline=None)
@given(first=parts, start=st.integers(1, 60), data=st.data())
def test_each_source_is_read_without_a_gap_also_across_phases(
    first: list[int], start: int, data: st.DataObject
) -> None:
    second = data.draw(st.lists(st.integers(0, 12), min_size=len(first), max_size=len(first)).filter(any))
    mixture = Mixture([phase(0, first), phase(start, second)])
    positions = np.arange(150)
    sources, own = mixture.at(positions)
    for source in range(len(first)):
        assert own[sources == source].tolist() == list(range(int((sources == source).sum())))
    for num_positions in (0, 1, start, start + 1, 100):
        expected = np.bincount(sources[:num_positions], minlength=len(first)).tolist()
        assert mixture.counts(num_positions) == expected
    for position in (0, start - 1, start, 149):
        alone = [int(part[0]) for part in mixture.at(np.array([position]))]
        assert alone == [int(sources[position]), int(own[position])]


def test_shares_are_what_was_written_not_the_nearest_binary_numbers() -> None:
    assert shares_of({"a": 0.7, "b": 0.2, "c": 0.1}) == {
        "a": Fraction(7, 10),
        "b": Fraction(1, 5),
        "c": Fraction(1, 10),
    }
    assert shares_of({"a": 3, "b": 1}) == {"a": Fraction(3, 4), "b": Fraction(1, 4)}


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": 1.0, "b": -1.0}, {"a": 0.123456789, "b": 0.2}])
def test_weights_that_mean_nothing_or_too_much_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match="weights"):
        shares_of(weights)
