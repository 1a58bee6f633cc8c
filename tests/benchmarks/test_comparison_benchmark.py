"""The table of a comparison: differences are taken seed by seed."""

from __future__ import annotations

import math
import re

import pytest

from benchmarks._variants import BY_POSITION, Variant, difference, ranked, table
from benchmarks.comparison import differences_by_position, draw
from pipelines.stages.evaluate.results import Curve, CurvePoint

VARIANTS = {
    "bmojo": Variant({0: 0.5, 1: 0.9, 2: 0.7}, 100, 10),
    "swa": Variant({0: 0.4, 1: 0.8, 2: 0.6}, 100, 10),
    "mamba2": Variant({2: 0.9, 1: 1.0, 0: 0.8}, 100, 10),
    "attention": Variant({3: 0.1}, 100, 10),
}


def test_what_all_seeds_share_is_not_in_the_interval() -> None:
    """The losses differ by 0.4 between seeds, but always by 0.1 between these models."""
    assert difference("swa", VARIANTS, "bmojo") == "-0.100 (-0.100 to -0.100)"
    assert difference("bmojo", VARIANTS, "bmojo") == "-"
    assert difference("attention", VARIANTS, "bmojo") == "-"  # no seed of the baseline
    assert difference("swa", VARIANTS, "not there yet") == "-"


def test_the_interval_is_students() -> None:
    """Differences 0.3, 0.1, 0.2: mean 0.2, deviation 0.1, and t = 4.303 for two degrees of freedom."""
    value, low, high = map(float, re.findall(r"[+-][\d.]+", difference("mamba2", VARIANTS, "bmojo")))
    half = 4.303 * 0.1 / 3**0.5
    assert value == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))


def test_the_best_comes_first() -> None:
    names = [line.split("|")[1].strip() for line in table(VARIANTS, "bmojo", "loss").splitlines()[2:]]
    assert names == ["attention", "swa", "bmojo", "mamba2"]
    accuracies = {name: Variant(one.figures, better="higher") for name, one in VARIANTS.items()}
    assert ranked(accuracies) == names[::-1]


def test_curves_are_compared_seed_by_seed_in_nats() -> None:
    def variant(nats: dict[int, tuple[float, float]]) -> Variant:
        curves = {
            seed: Curve(
                name=BY_POSITION, title="", x_label="", y_label="",
                points=tuple(CurvePoint(x=64 * n, y=math.exp(loss)) for n, loss in enumerate(losses, 1)),
            )
            for seed, losses in nats.items()
        }  # fmt: skip
        return Variant({seed: 1.0 for seed in nats}, curves=curves)

    variants = {
        "a": variant({0: (3.0, 2.0), 1: (4.0, 3.0), 2: (9.0, 9.0)}),
        "b": variant({0: (3.1, 2.4), 1: (4.3, 3.4)}),
    }
    found = differences_by_position("b", variants, "a")
    assert found == [(64, pytest.approx(0.2)), (128, pytest.approx(0.4))]
    assert len(draw(variants, "a", "loss").axes) == 2
    assert len(draw(VARIANTS, "bmojo", "loss").axes) == 1
