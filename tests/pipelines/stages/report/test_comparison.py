"""Differences are paired where both models were measured on the same units; a best model is one by its intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from base.errors import DamagedError
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.report.comparison import Column, compare
from pipelines.stages.report.subjects import gather, group
from pipelines.stages.report.tables import verdicts
from pipelines.stages.report.units import read_units
from pipelines.stages.sections import Section, Training
from pipelines.stages.uncertainty import Ratio, interval, paired_difference
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.report.made_up import write_units

TOKENS = np.array([100.0, 300, 50, 1000, 250, 80, 420, 700])
NATS = TOKENS * np.array([3.1, 3.5, 2.8, 3.3, 4.0, 3.0, 3.6, 3.2])
ALTERNATING = np.array([1.0, -1] * 4)


def measured(folder: Path, name: str, nats: np.ndarray, identity: str = "split", seed: int | None = None) -> Section:
    artifact = ArtifactDir.at(folder / name)
    estimate = interval(Ratio(nats, TOKENS))
    figure = Figure(name="loss", value=estimate.value, low=estimate.low, high=estimate.high, unit="nats", is_main=True)
    result = MeasureResult(
        name="text", kind="text", unit="document", num_units=len(TOKENS), figures=(figure,),
        references=(Figure(name="gzip", value=5.0, unit="nats"), Figure(name="other", value=1.0, unit="bits")),
        units=write_units(artifact, "text", identity, loss=(nats, TOKENS)),
    )  # fmt: skip
    training = None
    if seed is not None:
        recipe = {"model": name.partition("-")[0]}
        training = Training(series=[], tokens=[], seconds=[], recipe=recipe, seed=seed)
    return Section(subject=name, training=training, results=[result], artifact=artifact)


def column_of(sections: list[Section], baseline: str) -> Column:
    (column,) = compare(group(gather(sections)), baseline)
    return column


def test_a_difference_is_paired_over_the_units_of_both(tmp_path: Path) -> None:
    worse = NATS + TOKENS * (0.1 + 0.01 * ALTERNATING)
    column = column_of([measured(tmp_path, "a", NATS), measured(tmp_path, "b", worse)], "a")
    delta = column.cells["b"].delta
    assert delta == paired_difference(Ratio(worse, TOKENS), Ratio(NATS, TOKENS))
    assert delta is not None
    assert delta.value == pytest.approx((TOKENS * (0.1 + 0.01 * ALTERNATING)).sum() / TOKENS.sum())
    assert delta.low is not None
    assert delta.low > 0  # though the intervals of the two overlap by far
    assert column.cells["a"].delta is None
    assert column.best == "a"
    assert column.key == "text/loss"
    assert [(one.name, one.values) for one in column.references] == [("gzip", (5.0,))]


def test_a_model_that_cannot_be_told_apart_keeps_the_other_from_being_best(tmp_path: Path) -> None:
    close = NATS + TOKENS * (0.01 + 0.2 * ALTERNATING)
    sections = [measured(tmp_path, "a", NATS), measured(tmp_path, "b", close), measured(tmp_path, "c", NATS + TOKENS)]
    column = column_of(sections, "a")
    assert column.best is None
    assert column.tied == (column.ranked()[1],)
    assert set(column.ranked()[:2]) == {"a", "b"}
    (said,) = verdicts([column], group(gather(sections)))
    first, second = column.ranked()[:2]
    assert said == (
        f"loss: no model is clearly best. {first} has the best value; what cannot be told apart from it: {second}."
    )


def test_models_on_other_documents_are_not_compared_and_it_is_said_why(tmp_path: Path) -> None:
    sections = [measured(tmp_path, "a", NATS), measured(tmp_path, "b", NATS + TOKENS, identity="another")]
    column = column_of(sections, "a")
    assert column.cells["b"].delta is None
    assert column.best is None
    (problem,) = column.problems
    assert problem.startswith("b: measured on other documents than a (another validation split")


def test_replicates_have_students_interval_over_seeds(tmp_path: Path) -> None:
    sections = [measured(tmp_path, f"x-{seed}", NATS + TOKENS * 0.1 * seed, seed=seed) for seed in range(3)]
    sections.append(measured(tmp_path, "y", NATS + TOKENS))
    column = column_of(sections, "y")
    first = NATS.sum() / TOKENS.sum()
    cell = column.cells["x"]
    half = 4.30265 * 0.1 / 3**0.5
    assert cell.each == pytest.approx((first, first + 0.1, first + 0.2))
    assert cell.estimate == pytest.approx((first + 0.1, first + 0.1 - half, first + 0.1 + half))
    assert cell.delta == (pytest.approx(-0.9), None, None), "one seed says nothing of the spread of its model's seeds"


@pytest.mark.parametrize(("seeds", "half"), [([0, 1], 12.7062 * 0.02), ([2, 3], 4.30265 * (0.5**2 + 0.52**2) ** 0.5)])
def test_what_a_seed_does_to_both_models_is_not_in_their_difference(
    tmp_path: Path, seeds: list[int], half: float
) -> None:
    """Seeds differ by 1.0, and models by 0.3 in one and by 0.34 in another; of other seeds nothing cancels."""
    sections = [measured(tmp_path, f"x-{seed}", NATS + TOKENS * seed, seed=seed) for seed in (0, 1)]
    sections += [
        measured(tmp_path, f"y-{seed}", NATS + TOKENS * (number + shift), seed=seed)
        for number, (seed, shift) in enumerate(zip(seeds, (0.3, 0.34), strict=True))
    ]
    delta = column_of(sections, "x").cells["y"].delta
    assert delta == pytest.approx((0.32, 0.32 - half, 0.32 + half), rel=5e-3)


def test_higher_is_better_where_it_says_so() -> None:
    def right(name: str, value: float) -> Section:
        figure = Figure(name="accuracy", value=value, better="higher", chance=0.25)
        result = MeasureResult(name="piqa", kind="zero_shot", unit="example", num_units=9, figures=(figure,))
        return Section(subject=name, results=[result])

    column = column_of([right("a", 0.3), right("b", 0.5)], "a")
    assert column.ranked() == ["b", "a"]
    assert column.best is None  # there are no intervals
    (said,) = verdicts([column], group(gather([right("a", 0.3), right("b", 0.5)])))
    assert said == "accuracy: b has the best value. Not every difference to it has an interval."


def test_a_figure_that_two_measures_have_is_told_apart() -> None:
    results = [
        MeasureResult(name=name, kind=name, unit="example", num_units=9, figures=(Figure(name="accuracy", value=0.5),))
        for name in ("piqa", "arc_easy")
    ]
    columns = compare(group(gather([Section(subject="a", results=results)])), "a")
    assert [column.title for column in columns] == ["piqa: accuracy", "arc easy: accuracy"]


def test_a_damaged_file_of_units_is_named(tmp_path: Path) -> None:
    file = tmp_path / "units.npz"
    file.write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(DamagedError, match=r"units\.npz is damaged"):
        read_units(file, "loss")
