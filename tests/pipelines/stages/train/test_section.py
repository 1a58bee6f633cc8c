"""A training on the page of a report: every recorded metric, and the time of its steps."""

from __future__ import annotations

import pytest

from pipelines.stages.train.section import seconds_by_step, series_of


def test_every_metric_that_was_recorded_is_drawn() -> None:
    names = ("train/loss", "valid/loss", "valid/loss/code", "train/lr", "train/grad_norm", "train/mfu", "train/new_one")
    clocks = ("train/tokens", "train/max_steps", "train/resumed_from_step")
    series = list(series_of({name: [(1, 2.0)] for name in (*names, *clocks)}))
    assert [(one.plot, one.part) for one in series] == [
        ("loss", "training"),
        ("loss", "validation"),
        ("valid-loss-by-source", "code"),
        ("grad-norm", ""),
        ("lr", ""),
        ("mfu", ""),
        ("new_one", ""),
    ]


def test_the_time_of_steps_follows_from_tokens_and_speed() -> None:
    history = {
        "train/tokens": [(1, 100.0), (5, 500.0), (9, 900.0)],
        "train/tokens_per_s": [(1, 50.0), (5, 100.0), (9, 200.0)],
    }
    assert seconds_by_step(history) == [(0, 0), (1, pytest.approx(2)), (5, pytest.approx(6)), (9, pytest.approx(8))]
    assert seconds_by_step({}) == [(0, 0)]
    measured = history | {"train/hours": [(1, 0.5), (5, 1.0)]}
    assert seconds_by_step(measured) == [(0, 0), (1, 1800), (5, 3600)], "as measured, where it was"


def test_curves_of_a_family_share_a_plot() -> None:
    names = ("train/time/data", "train/time/forward", "train/norm/update/mlp")
    series = list(series_of({name: [(1, 2.0)] for name in names}))
    assert [(one.plot, one.part) for one in series] == [
        ("time-by-part", "data"),
        ("time-by-part", "forward"),
        ("norm-update", "mlp"),
    ]
