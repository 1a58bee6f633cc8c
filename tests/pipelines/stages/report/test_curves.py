"""Curves: smoothed without a shift, at most eight per panel, equal ones as one, over steps, tokens and time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stages.report.clocks import clocks
from pipelines.stages.report.curves import training_panels
from pipelines.stages.report.drawing import spread
from pipelines.stages.report.line_plots import draw_lines, log_ticks
from pipelines.stages.report.panels import MAX_LINES, Line, Panel, band_frame, split, steep_from
from pipelines.stages.report.smoothing import mean_of, smoothed
from pipelines.stages.report.subjects import gather, group
from pipelines.stages.sections import Section, Series, Training


def line(group: str, slope: float, part: str = "") -> Line:
    x = np.arange(5.0)
    return Line(group, group, x, slope * x, part=part)


def panel(*lines: Line) -> Panel:
    return Panel(name="loss", title="Loss", x_label="step", y_label="nats", lines=lines)


def training(losses: list[float], seed: int = 0, **recipe: object) -> Training:
    points = [(step, loss) for step, loss in enumerate(losses, 1)]
    series = [
        Series(plot="loss", title="Loss", part="training", y_label="nats", points=points),
        Series(plot="lr", title="Learning rate", y_label="", points=[(1, 0.1), (2, 0.2)]),
    ]
    return Training(series=series, tokens=[(0, 0), (2, 4e6)], seconds=[(0, 0), (2, 7200.0)], recipe=recipe, seed=seed)


def test_smoothing_keeps_straight_lines_and_averages_noise() -> None:
    straight = np.linspace(1, 3, 100)
    assert smoothed(straight)[:-4] == pytest.approx(straight[:-4])
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    assert np.std(smoothed(noise)) < 0.25
    assert smoothed(noise)[500] == pytest.approx(noise[460:541].mean())
    assert smoothed(noise[:10]) == pytest.approx(noise[:10])  # too short


def test_several_models_have_a_panel_per_part_and_one_model_one_panel() -> None:
    two = panel(
        *(line(name, slope, part) for part in ("training", "validation") for name, slope in (("a", 1), ("b", 2)))
    )
    assert [(one.name, one.title, [drawn.label for drawn in one.lines]) for one in split(two, ["a", "b"])] == [
        ("loss-training", "Loss: training", ["a", "b"]),
        ("loss-validation", "Loss: validation", ["a", "b"]),
    ]
    alone = panel(line("a", 1, "training"), line("a", 2, "validation"))
    (one,) = split(alone, ["a"])
    assert [drawn.label for drawn in one.lines] == ["training", "validation"]


def test_no_panel_has_more_than_eight_lines_and_those_are_the_best() -> None:
    many = panel(*(line(f"m{n}", n) for n in range(12)))
    ranking = [f"m{n}" for n in (11, 3, 5, 7, 9, 0, 1, 2, 4, 6, 8, 10)]
    (one,) = split(many, ranking)
    assert {drawn.group for drawn in one.lines} == set(ranking[:MAX_LINES])
    assert one.note == "The best 8 of 12 models; the tables have all."


def test_equal_lines_are_drawn_once() -> None:
    (one,) = split(panel(*(line(f"m{n}", 1) for n in range(12))), [])
    assert [drawn.label for drawn in one.lines] == ["all 12 models"]
    assert one.note == "Equal in all 12 models."
    (some,) = split(panel(line("a", 1), line("b", 1), line("c", 2)), [])
    assert [drawn.label for drawn in some.lines] == ["a and 1 more", "c"]


def test_curves_go_over_steps_tokens_and_time() -> None:
    found = clocks([training([3.0, 2.0])])
    assert [(clock.name, clock.x_label) for clock in found] == [
        ("steps", "step"),
        ("tokens", "million tokens"),
        ("time", "hours in optimizer steps"),
    ]
    groups = group(gather([Section(subject="a", training=training([3.0, 2.0]))], trained=["a"]))
    drawn = [training_panels(groups, clock, ["a"])[0].lines[0].x.tolist() for clock in found]
    assert drawn == [[1, 2], [2, 4], [1, 2]]
    assert [clock.name for clock in clocks([replace(training([3.0]), tokens=[], seconds=[])])] == ["steps"]


def test_replicates_are_their_mean_with_faint_single_curves() -> None:
    sections = [
        Section(subject=f"a-{seed}", training=training([3.0 + seed, 2.0 + seed], seed=seed, lr=1)) for seed in (0, 1)
    ]
    groups = group(gather(sections, trained=["a-0", "a-1"]))
    loss, lr = training_panels(groups, clocks([])[0], ["a"])
    (mean,) = loss.lines
    assert mean.y.tolist() == [3.5, 2.5]
    assert [y.tolist() for _, y in mean.faint] == [[3, 2], [4, 3]]
    assert [drawn.y.tolist() for drawn in lr.lines] == [[0.1, 0.2]]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.floats(1, 1e4)), min_size=2, max_size=3))
def test_replicates_of_a_few_points_are_drawn_even_if_their_times_do_not_meet(runs: list[tuple[int, float]]) -> None:
    """One seed may end before the first point of another: (points, seconds per step) each."""
    trainings = [
        replace(training([3.0, 2.0, 1.5][:points], seed, lr=1), seconds=[(0, 0), (3, 3 * seconds)])
        for seed, (points, seconds) in enumerate(runs)
    ]
    names = [f"a-{seed}" for seed in range(len(runs))]
    sections = [Section(subject=name, training=one) for name, one in zip(names, trainings, strict=True)]
    other = training([2.5], lr=2)
    groups = group(gather([*sections, Section(subject="b", training=other)], trained=[*names, "b"]))
    for clock in clocks([*trainings, other]):
        panel = training_panels(groups, clock, ["a", "b"])[0]
        assert [len(line.x) > 0 for line in panel.lines] == [True, True]
        draw_lines(panel, {})


def test_replicates_that_do_not_meet_are_averaged_point_by_point() -> None:
    one, other = (np.array([1.0, 2.0]), np.array([3.0, 2.0])), (np.array([5.0]), np.array([4.0]))
    x, y = mean_of([one, other])
    assert (x.tolist(), y.tolist()) == ([3.0], [3.5])


def test_points_that_are_not_numbers_are_left_out() -> None:
    groups = group(gather([Section(subject="a", training=training([float("nan"), 2.0]))], trained=["a"]))
    assert training_panels(groups, clocks([])[0], ["a"])[0].lines[0].y.tolist() == [2.0]


def test_the_frame_of_a_loss_leaves_out_its_steep_beginning() -> None:
    x = np.arange(101.0)
    falling = replace(panel(Line("a", "a", x, 10 * np.exp(-x / 5) + 3)), is_loss=True)
    frame = steep_from(falling)
    assert frame is not None
    assert frame[0] < 3 < frame[1] < 3.2
    assert steep_from(replace(falling, is_loss=False)) is None


def test_one_wide_interval_does_not_flatten_the_line() -> None:
    x = np.arange(32.0)
    y, half = 300 + np.sin(x), np.where(x == 5, 50_000.0, 4.0)
    frame = band_frame(panel(Line("a", "a", x, y, y - half, y + half)))
    assert frame is not None
    assert 290 < frame[0] < frame[1] < 310
    assert band_frame(panel(Line("a", "a", x, y, y - 4, y + 4))) is None
    assert band_frame(panel(line("a", 1))) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_labels_do_not_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    least = min(gap, 1 / (len(wanted) - 1)) if len(wanted) > 1 else gap
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    ordered = sorted(zip(wanted, places, strict=True))
    assert all(b - a >= least - 1e-9 for (_, a), (_, b) in itertools.pairwise(ordered))
    assert [place for _, place in ordered] == sorted(places)


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


@given(st.floats(1, 1e6), st.floats(1.03, 1e6))
def test_a_log_axis_has_few_round_ticks(low: float, times: float) -> None:
    ticks = log_ticks(low, low * times)
    assert all(low <= tick <= low * times for tick in ticks)
    assert 2 <= len(ticks) <= 14
    assert ticks == sorted(set(ticks))
    if times > 10:
        assert all(float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 1e6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (24, 1500, [50, 100, 200, 500, 1000]),
        (24, 98, [30, 50, 70]),
        (97, 145, [100, 120, 140]),
    ],
)
def test_ticks_of_a_log_axis(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)
