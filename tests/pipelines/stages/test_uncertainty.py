"""How often the intervals contain the true figure, measured, and what they are where it is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.stages.uncertainty import (
    Estimate,
    Ratio,
    Transform,
    difference_of_means,
    interval,
    paired_difference,
    replicates,
)

NUM_RESAMPLED = 400
LEAST, MOST = 0.915, 0.985
"""Of a share of 400 that is 0.95: three standard errors below and above."""


def documents(seed: int, depends_on_length: bool) -> Ratio:
    """A corpus: lengths over four powers of ten, the longest tenth of the documents with half of the tokens."""
    rng = np.random.default_rng(seed)
    tokens_n = np.ceil(np.exp(rng.normal(6, 1.2, 50_000)))
    per_token_n = 3.5 + rng.normal(0, 0.5, 50_000) - (0.1 * np.log(tokens_n) if depends_on_length else 0.6)
    return Ratio(tokens_n * np.maximum(per_token_n, 0.1), tokens_n)


def some(ratio: Ratio, index_n: np.ndarray) -> Ratio:
    return Ratio(ratio.numerator_n[index_n], ratio.denominator_n[index_n])


def coverage(make: Callable[[np.ndarray], Estimate], size: int, num_units: int, truth: float) -> float:
    """Share of evaluations on `num_units` random units whose interval contains the figure of all."""
    rng = np.random.default_rng(num_units)
    hits = 0
    for _ in range(NUM_RESAMPLED):
        _, low, high = make(rng.integers(0, size, num_units))
        assert low is not None
        assert high is not None
        hits += low <= truth <= high
    return hits / NUM_RESAMPLED


@pytest.mark.ci
@pytest.mark.parametrize("transform", ["identity", "exp"])
@pytest.mark.parametrize("num_units", [10, 30, 100, 500])
def test_intervals_contain_the_figure_of_all_documents_as_often_as_they_say(
    num_units: int, transform: Transform
) -> None:
    corpus = documents(seed=0, depends_on_length=transform == "exp")
    share = coverage(
        lambda index: interval(some(corpus, index), transform), 50_000, num_units, corpus.transformed(transform)
    )
    assert LEAST <= share <= MOST


@pytest.mark.ci
@pytest.mark.parametrize("num_units", [10, 30, 100, 500])
def test_so_do_the_intervals_of_differences(num_units: int) -> None:
    one = documents(seed=1, depends_on_length=True)
    own = np.random.default_rng(2).normal(0.05, 0.1, 50_000)
    other = Ratio(one.numerator_n + own * one.denominator_n, one.denominator_n)
    share = coverage(
        lambda index: paired_difference(some(other, index), some(one, index)),
        50_000, num_units, other.value - one.value,
    )  # fmt: skip
    assert LEAST <= share <= MOST


@pytest.mark.parametrize("num_units", [10, 30, 100])
def test_so_do_those_of_right_answers_whatever_their_share(num_units: int) -> None:
    """Exactly, over the possible counts; it jumps from share to share, as that of every interval of counts."""
    counts = range(num_units + 1)
    ends = [interval(Ratio((np.arange(num_units) < count).astype(float), np.ones(num_units))) for count in counts]
    shares = np.linspace(0.02, 0.98, 193)
    covered = [
        sum(
            math.comb(num_units, count) * share**count * (1 - share) ** (num_units - count)
            for count, (_, low, high) in zip(counts, ends, strict=True)
            if low is not None and high is not None and low <= share <= high
        )
        for share in shares
    ]
    assert 0.945 <= float(np.mean(covered)) <= 0.965
    assert min(covered) >= 0.83


def test_a_pair_is_told_apart_where_the_two_intervals_overlap() -> None:
    one = some(documents(seed=4, depends_on_length=False), np.arange(100))
    other = Ratio(one.numerator_n + 0.05 * one.denominator_n, one.denominator_n)
    _, low, _ = interval(other)
    _, _, high = interval(one)
    assert low is not None
    assert high is not None
    assert low < high
    value, low, high = paired_difference(other, one)
    assert low is not None
    assert value == pytest.approx(0.05)
    assert 0.04 < low <= value


def test_a_difference_to_twice_itself_is_as_sure_as_the_figure() -> None:
    one = some(documents(seed=10, depends_on_length=True), np.arange(40))
    twice = Ratio(2 * one.numerator_n, one.denominator_n)
    assert paired_difference(twice, one) == pytest.approx(interval(one))


def test_the_difference_of_perplexities_is_that_of_their_values() -> None:
    one, other = (some(documents(seed, depends_on_length=False), np.arange(50)) for seed in (5, 6))
    value, low, high = paired_difference(other, one, "exp")
    assert value == pytest.approx(np.exp(other.value) - np.exp(one.value))
    assert low is not None
    assert high is not None
    assert low < value < high
    mirrored = paired_difference(one, other, "exp")
    assert mirrored == pytest.approx((-value, -high, -low))


def test_a_transform_moves_the_ends_with_the_value() -> None:
    ratio = some(documents(seed=7, depends_on_length=False), np.arange(40))
    plain, perplexity = interval(ratio), interval(ratio, "exp")
    assert perplexity == pytest.approx(np.exp(np.array(plain, dtype=float)))


def test_one_document_with_half_of_the_tokens_is_no_reason_for_an_absurd_interval() -> None:
    tokens_n = np.array([10268.0, 2619, 2340, 98, 32924, 1868, 1603, 6314, 419, 1579])
    loss_n = np.array([5.905, 5.862, 5.871, 6.437, 5.939, 5.966, 5.997, 4.940, 6.002, 5.194])
    value, low, high = interval(Ratio(loss_n * tokens_n, tokens_n))
    assert (low, high) == (4.940, 6.437)
    value, low, high = paired_difference(Ratio((loss_n + 0.1) * tokens_n, tokens_n), Ratio(loss_n * tokens_n, tokens_n))
    assert (low, value, high) == pytest.approx((0.1, 0.1, 0.1))


def test_equal_units_have_equal_intervals_every_time() -> None:
    ratio = some(documents(seed=8, depends_on_length=False), np.arange(5000))
    assert interval(ratio) == interval(Ratio(ratio.numerator_n.copy(), ratio.denominator_n.copy()))


def test_more_units_than_are_resampled_one_by_one_give_the_same_width() -> None:
    ratio = some(documents(seed=9, depends_on_length=False), np.arange(20_000))
    value, low, high = interval(ratio)
    assert low is not None
    assert high is not None
    residual_n = ratio.numerator_n - value * ratio.denominator_n
    error = np.sqrt((residual_n**2).sum()) / ratio.denominator_n.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_where_nothing_can_be_said_there_is_no_interval() -> None:
    one = Ratio(np.array([3.0]), np.array([2.0]))
    assert interval(one) == (1.5, None, None)
    hopeless = Ratio(np.array([np.inf, 1.0]), np.array([1.0, 1.0]))
    assert interval(hopeless) == (np.inf, None, None)
    empty = Ratio(np.zeros(0), np.zeros(0))
    assert np.isnan(interval(empty).value)
    assert interval(empty).low is None
    assert paired_difference(one, one) == (0.0, None, None)
    assert interval(Ratio(np.array([9000.0, 8000.0]), np.array([1.0, 1.0])), "exp").value == np.inf
    with pytest.raises(ValueError, match="found 1 and 2 units"):
        paired_difference(one, hopeless)
    with pytest.raises(ValueError, match=r"found numerators \(2,\) and denominators \(3,\)"):
        Ratio(np.zeros(2), np.zeros(3))


def test_all_right_is_not_certainty() -> None:
    assert interval(Ratio(np.ones(10), np.ones(10))) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    several_each = Ratio(np.array([4.0, 2.0, 8.0]), np.array([4.0, 2.0, 8.0]))
    _, low, high = interval(several_each)
    assert high == 1.0
    assert low is not None
    assert low < 0.5
    _, low, high = interval(Ratio(np.array([4.0, 2.0, 7.0]), np.array([4.0, 2.0, 8.0])))
    assert high == 1.0


def test_seeds_have_students_interval() -> None:
    assert replicates([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 4.30265 / 3**0.5, 2.0 + 4.30265 / 3**0.5))
    assert replicates([1.0]) == (1.0, None, None)
    loss = [4.3, 5.0, 4.2]  # nats; the interval of the plain mean of these perplexities reaches below 0
    assert replicates(np.exp(loss).tolist(), "exp") == pytest.approx(tuple(np.exp(replicates(loss))))
    assert replicates([1.0, float("inf")], "exp") == (float("inf"), None, None)
    with pytest.raises(ValueError, match="no value"):
        replicates([])


def test_differences_over_other_seeds_have_the_spread_of_each_side() -> None:
    half = 2.77645 * (2 / 3) ** 0.5  # equal spreads of three: Student's t of 4 degrees of freedom
    assert difference_of_means([1.0, 2.0, 3.0], [6.0, 7.0, 8.0]) == pytest.approx((-5.0, -5.0 - half, -5.0 + half))
    half = 4.30265 * (1 / 3) ** 0.5  # if one side has no spread, the degrees are those of the other
    assert difference_of_means([1.0, 2.0, 3.0], [5.0, 5.0]) == pytest.approx((-3.0, -3.0 - half, -3.0 + half))
    assert difference_of_means([2.0, 2.0], [5.0, 5.0]) == (-3.0, -3.0, -3.0)
    assert difference_of_means([1.0, 2.0, 3.0], [5.0]) == (-3.0, None, None)
    assert difference_of_means([1.0], [5.0]) == (-4.0, None, None)
    with pytest.raises(ValueError, match="no value"):
        difference_of_means([], [1.0])


def test_so_do_the_intervals_of_differences_over_seeds() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(NUM_RESAMPLED):
        _, low, high = difference_of_means(rng.normal(1.0, 0.1, 4).tolist(), rng.normal(0.7, 0.01, 3).tolist())
        assert low is not None
        assert high is not None
        hits += low <= 0.3 <= high
    assert LEAST <= hits / NUM_RESAMPLED <= MOST
