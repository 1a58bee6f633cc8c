"""The law that made the points is found; intervals contain the truth as often as they say; no fit is no figure."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.stages.ladder.law import NoFitError, Point, fit_law

FLOOR, ALPHA, FIRST = 1.7, 0.15, 1e15


def loss_at(flops: float) -> float:
    return FLOOR + 2.0 * (flops / FIRST) ** -ALPHA


def points(num: int, noise: float, seed: int, span: float = 100.0) -> list[Point]:
    deviations = np.random.default_rng(seed).normal(0, noise, num)
    flops = np.geomspace(FIRST, FIRST * span, num)
    return [Point(c, loss_at(c) * np.exp(d)) for c, d in zip(flops.tolist(), deviations.tolist(), strict=True)]


@pytest.mark.parametrize("num", [4, 8])
def test_an_exact_law_is_recovered(num: int) -> None:
    law = fit_law(points(num, 0.0, 0))
    assert law.alpha.value == pytest.approx(ALPHA, rel=1e-3)
    assert law.floor.value == pytest.approx(FLOOR, rel=1e-3)
    assert law.predict(FIRST * 1e4).value == pytest.approx(loss_at(FIRST * 1e4), rel=1e-3)


@pytest.mark.ci
@pytest.mark.parametrize(("num", "noise"), [(4, 0.003), (5, 0.01), (8, 0.003)])
def test_intervals_contain_the_truth_in_95_percent(num: int, noise: float) -> None:
    """Of 200 trials 95 % is 190; fewer than 181 happen once in 300 if the intervals are right."""
    target = 10 * 100 * FIRST
    inside = {"law": 0, "training": 0, "alpha": 0, "floor": 0}
    for seed in range(200):
        law = fit_law(points(num, noise, seed))
        new = loss_at(target) * np.exp(np.random.default_rng(10_000 + seed).normal(0, noise))
        for name, estimate, truth in (
            ("law", law.predict(target, of_a_training=False), loss_at(target)),
            ("training", law.predict(target), new),
            ("alpha", law.alpha, ALPHA),
            ("floor", law.floor, FLOOR),
        ):
            assert estimate.low is not None
            assert estimate.high is not None
            inside[name] += estimate.low <= truth <= estimate.high
    assert min(inside.values()) >= 181, inside


def test_one_wild_point_does_not_carry_the_law_away() -> None:
    clean = points(9, 0.0005, 3)
    wild = [*clean[:4], Point(clean[4].flops, clean[4].loss * 1.3), *clean[5:]]
    assert fit_law(wild).predict(FIRST * 1e3).value == pytest.approx(loss_at(FIRST * 1e3), rel=0.03)


def test_units_of_compute_change_nothing() -> None:
    ours = points(6, 0.005, 1)
    scaled = [Point(point.flops * 1e6, point.loss) for point in ours]
    assert fit_law(scaled).alpha == pytest.approx(fit_law(ours).alpha)
    assert fit_law(scaled).predict(1e24) == pytest.approx(fit_law(ours).predict(1e18))


def test_more_noise_means_wider_intervals() -> None:
    narrow, wide = (fit_law(points(6, noise, 2)).predict(FIRST * 1e3) for noise in (0.001, 0.01))
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (points(3, 0.0, 0), "found 3 sizes, expected 4"),
        (points(6, 0.0, 0, span=2.0), "2 times the FLOPs of the smallest"),
        ([Point(FIRST, 3.0), Point(FIRST, 3.1), Point(FIRST * 9, 2.5), Point(FIRST * 9, 2.6)], "2 different amounts"),
        ([Point(FIRST * 4**n, 2.0 + 0.1 * n) for n in range(5)], "does not fall with compute"),
        ([Point(FIRST * 4**n, float("nan")) for n in range(5)], "not positive numbers"),
    ],
)
def test_what_determines_no_law_is_said(made: list[Point], reason: str) -> None:
    with pytest.raises(NoFitError, match=reason):
        fit_law(made)
