"""How sure a figure is: 95 % intervals over documents or examples, of differences of two models, and over seeds.

A figure is a ratio of two sums over units that are drawn at random: documents, examples, windows. Their lengths are
very unequal: a few documents may hold half of the tokens. Then the percentiles of a bootstrap, also bias-corrected,
contain the true figure in 80 to 90 % of cases with 30 documents. So the interval is

    value +- q * s,    q = the 95th percentile of |t*| over resamples, at least t and at most 1.5 t

with s from the jackknife, t* the studentised figure of each resample (B. Efron and R. Tibshirani, An Introduction to
the Bootstrap, 1993: 11.5 and 12.5), and Student's t for the effective number of units. A mean is not outside the range
of its units, so neither is the interval of ten units or more. The tests measure how often it contains the true figure.
Everything is a function of the units alone: equal units give equal intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

Transform = Literal["identity", "exp"]
"""What is applied to the ratio of the sums: perplexity is exp of a loss."""

_NUM_RESAMPLES = 2000
_MAX_UNITS = 1000  # more are added up in groups drawn at random, whose sums vary as the units do
_SEED = 20_240_627
_LEVEL = 0.95
_MOST_T = 1.5  # without a limit one document with half of the tokens makes t* as large as it likes
_UNITS_WITH_RANGE = 10  # as likely as 2 in 1000 all are on one side of the figure
_NORMAL = 1.959964
# Student's t, 97.5 %, by 1 / degrees of freedom, between which it is nearly straight.
_DEGREES = np.array([np.inf, 120, 60, 40, 30, 20, 15, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1.5, 1])
_STUDENT = np.array(
    [
        _NORMAL, 1.97993, 2.00030, 2.02108, 2.04227, 2.08596, 2.13145, 2.17881, 2.22814, 2.26216, 2.30600, 2.36462,
        2.44691, 2.57058, 2.77645, 3.18245, 4.30265, 6.01666, 12.7062,
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """Sums of units, n of them, in an order that is always the same: sum(numerator_n) / sum(denominator_n).

    Of a loss in nats per token: the nats and the tokens of each document. Of an accuracy: 0 or 1, and 1.
    """

    numerator_n: np.ndarray
    denominator_n: np.ndarray

    def __post_init__(self) -> None:
        if self.numerator_n.shape != self.denominator_n.shape or self.numerator_n.ndim != 1:
            raise ValueError(
                f"found numerators {self.numerator_n.shape} and denominators {self.denominator_n.shape}, expected one "
                "of each per unit."
            )

    @cached_property
    def value(self) -> float:
        """The figure; NaN if the denominators sum to 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(self.numerator_n.sum(dtype=np.float64), self.denominator_n.sum(dtype=np.float64)))

    def transformed(self, transform: Transform) -> float:
        """The figure after its transform; infinity where that is more than a float holds."""
        return _apply(transform, self.value)

    @property
    def num_units(self) -> int:
        """Documents, examples or windows."""
        return len(self.numerator_n)


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None: it cannot be estimated."""

    value: float
    low: float | None
    high: float | None


def interval(ratio: Ratio, transform: Transform = "identity") -> Estimate:
    """A figure of one model with its interval; without one if there are fewer than two units, or a sum is not finite.

    Shares of right answers have Wilson's interval (1927) if they are one per unit, or all right, or all wrong.
    """
    value = ratio.transformed(transform)
    columns_nk = np.stack([ratio.numerator_n, ratio.denominator_n], axis=1).astype(np.float64)
    if not _is_usable(columns_nk):
        return Estimate(value, None, None)
    is_share = _is_share(columns_nk)
    if is_share and ((columns_nk[:, 1] == 1).all() or ratio.value in (0.0, 1.0)):
        low, high = _wilson(ratio.value, len(columns_nk))
    else:
        half = _half_width(columns_nk, _Ratio(), _effective(columns_nk[:, 1]))
        low, high = _within_range(ratio.value, half, _of_units(columns_nk))
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, _apply(transform, low), _apply(transform, high))


def paired_difference(a: Ratio, b: Ratio, transform: Transform = "identity") -> Estimate:
    """How much larger the figure of `a` is than that of `b`, with the interval of the difference.

    What both models find hard or easy in a unit cancels, so it is narrower than the intervals of the two suggest.

    Args: a, b: of the same units in the same order.
    Raises: ValueError: the numbers of units differ.
    """
    if a.num_units != b.num_units:
        raise ValueError(f"found {a.num_units} and {b.num_units} units: a pair needs the same ones.")
    with np.errstate(invalid="ignore"):
        value = float(np.subtract(a.transformed(transform), b.transformed(transform)))
    columns_nk = np.stack([a.numerator_n, a.denominator_n, b.numerator_n, b.denominator_n], axis=1).astype(np.float64)
    if not np.isfinite(value) or not _is_usable(columns_nk[:, :2]) or not _is_usable(columns_nk[:, 2:]):
        return Estimate(value, None, None)
    effective = min(_effective(columns_nk[:, 1]), _effective(columns_nk[:, 3]))
    half = _half_width(columns_nk, _Difference(transform), effective)
    if transform == "exp":
        return Estimate(value, value - half, value + half)
    return Estimate(value, *_within_range(value, half, _of_units(columns_nk[:, :2]) - _of_units(columns_nk[:, 2:])))


def replicates(values: list[float], transform: Transform = "identity") -> Estimate:
    """The mean over seeds with Student's interval; without one of a single value.

    Args: transform: exp: of figures such as perplexity, whose logarithms are averaged, so that no interval reaches
        below 0.
    Raises: ValueError: there is no value.
    """
    if not values:
        raise ValueError("found no value to take the mean of.")
    if transform == "exp":
        with np.errstate(divide="ignore"):
            mean, low, high = replicates(np.log(values).tolist())
        if low is None or high is None:
            return Estimate(_apply(transform, mean), None, None)
        return Estimate(_apply(transform, mean), _apply(transform, low), _apply(transform, high))
    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all():
        return Estimate(mean, None, None)
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """How much larger the mean over seeds is in `a` than in `b`, of seeds that have nothing to do with each other.

    Each side has a spread of its own (Welch's interval): models differ tenfold in how far their seeds lie apart. So
    there is no interval if one side is of a single seed. Raises: ValueError: there is no value in one of them.
    """
    if not a or not b:
        raise ValueError("found no value to take the mean of.")
    value = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or not np.isfinite([*a, *b]).all():
        return Estimate(value, None, None)
    squares = np.array([float(np.var(values, ddof=1)) / len(values) for values in (a, b)])
    total = float(squares.sum())
    if total == 0:
        return Estimate(value, value, value)
    degrees = total**2 / float((squares**2 / (np.array([len(a), len(b)]) - 1)).sum())
    half = student(degrees) * total**0.5
    return Estimate(value, value - half, value + half)


class _Ratio:
    """theta = s0 / s1 of sums s_rk, and its gradient. r: resamples, or units left out."""

    def theta(self, sums_rk: np.ndarray) -> np.ndarray:
        return np.asarray(sums_rk[:, 0] / sums_rk[:, 1])

    def gradient(self, sums_rk: np.ndarray) -> np.ndarray:
        return np.stack([np.ones(len(sums_rk)), -self.theta(sums_rk)], axis=1) / sums_rk[:, 1:2]


@dataclass(frozen=True)
class _Difference:
    """theta = f(s0 / s1) - f(s2 / s3), and its gradient."""

    transform: Transform

    def theta(self, sums_rk: np.ndarray) -> np.ndarray:
        a, b = (_Ratio().theta(sums_rk[:, first : first + 2]) for first in (0, 2))
        return np.asarray(np.exp(a) - np.exp(b) if self.transform == "exp" else a - b)

    def gradient(self, sums_rk: np.ndarray) -> np.ndarray:
        parts = []
        for first, sign in ((0, 1.0), (2, -1.0)):
            sums = sums_rk[:, first : first + 2]
            slope = np.exp(_Ratio().theta(sums)) if self.transform == "exp" else np.ones(len(sums))
            parts.append(sign * slope[:, None] * _Ratio().gradient(sums))
        return np.concatenate(parts, axis=1)


def _half_width(columns_nk: np.ndarray, figure: _Ratio | _Difference, effective: float) -> float:
    columns_nk = _grouped(columns_nk)
    num_units, num_columns = columns_nk.shape
    total_k = columns_nk.sum(axis=0)
    with np.errstate(all="ignore"):
        value = figure.theta(total_k[None])[0]
        without_n = figure.theta(total_k - columns_nk)
        without_n = without_n[np.isfinite(without_n)]  # a unit that is all there is
        error = np.sqrt((num_units - 1) / num_units * ((without_n - without_n.mean()) ** 2).sum())
        weights_rn = _resamples(num_units)
        sums_rk = weights_rn @ columns_nk
        products = (columns_nk[:, :, None] * columns_nk[:, None, :]).reshape(num_units, -1)
        squares_rkk = (weights_rn @ products).reshape(-1, num_columns, num_columns)
        gradient_rk = figure.gradient(sums_rk)
        variance_r = np.einsum("rk,rkl,rl->r", gradient_rk, squares_rkk, gradient_rk)
        errors_r = np.sqrt(variance_r * num_units / (num_units - 1))
        t_r = np.abs(figure.theta(sums_rk) - value) / errors_r
    t_r = t_r[np.isfinite(t_r)]
    quantile = float(np.quantile(t_r, _LEVEL)) if len(t_r) else 0.0
    t = student(effective - 1)
    return float(error) * max(t, min(quantile, _MOST_T * t))


def _of_units(columns_nk: np.ndarray) -> np.ndarray:
    """The figure of each unit alone; NaN of one without weight."""
    with np.errstate(divide="ignore", invalid="ignore"):
        alone_n = columns_nk[:, 0] / columns_nk[:, 1]
    return np.where(columns_nk[:, 1] > 0, alone_n, np.nan)


def _within_range(value: float, half: float, alone_n: np.ndarray) -> tuple[float, float]:
    known_n = alone_n[np.isfinite(alone_n)]
    low, high = value - half, value + half
    if len(known_n) < _UNITS_WITH_RANGE:
        return low, high
    return max(low, min(value, float(known_n.min()))), min(high, max(value, float(known_n.max())))


def _grouped(columns_nk: np.ndarray) -> np.ndarray:
    num_units = len(columns_nk)
    if num_units <= _MAX_UNITS:
        return columns_nk
    order_n = np.random.default_rng(_SEED).permutation(num_units)
    starts = np.linspace(0, num_units, _MAX_UNITS, endpoint=False).astype(int)
    return np.asarray(np.add.reduceat(columns_nk[order_n], starts, axis=0))


@lru_cache(maxsize=4)
def _resamples(num_units: int) -> np.ndarray:
    """How often each unit is in each resample, (resamples, units)."""
    counts = np.random.default_rng(_SEED).multinomial(num_units, np.full(num_units, 1 / num_units), _NUM_RESAMPLES)
    return counts.astype(np.float64)


def _is_usable(columns_nk: np.ndarray) -> bool:
    with_weight = np.count_nonzero(columns_nk[:, 1])
    return bool(with_weight >= 2 and np.isfinite(columns_nk).all() and columns_nk[:, 1].sum() > 0)


def _is_share(columns_nk: np.ndarray) -> bool:
    """Whether the numerators count some of what the denominators count."""
    numerator_n, denominator_n = columns_nk.T
    are_counts = (columns_nk == np.round(columns_nk)).all()
    return bool(are_counts and (numerator_n >= 0).all() and (numerator_n <= denominator_n).all())


def _effective(denominator_n: np.ndarray) -> float:
    """Equal units that would weigh as these do (L. Kish, Survey Sampling, 1965)."""
    return float(denominator_n.sum() ** 2 / (denominator_n**2).sum())


def _wilson(share: float, num_units: int) -> tuple[float, float]:
    z2 = _NORMAL**2
    centre = (share + z2 / (2 * num_units)) / (1 + z2 / num_units)
    half = _NORMAL / (1 + z2 / num_units) * np.sqrt(share * (1 - share) / num_units + z2 / (4 * num_units**2))
    return float(centre - half), float(centre + half)


def student(degrees: float) -> float:
    """The 97.5th percentile of Student's distribution; of less than one degree of freedom as of one."""
    return float(np.interp(1 / max(degrees, 1.0), 1 / _DEGREES, _STUDENT))


def _apply(transform: Transform, value: float) -> float:
    if transform == "identity":
        return value
    with np.errstate(over="ignore"):
        return float(np.exp(value))
