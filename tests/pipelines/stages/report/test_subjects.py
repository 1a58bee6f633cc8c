"""Sections of one model are joined, and models that differ in their seed alone are replicates."""

from __future__ import annotations

from typing import Any

from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.report.subjects import gather, group
from pipelines.stages.sections import Section, Training


def measured(name: str = "text", value: float = 3.0) -> MeasureResult:
    return MeasureResult(
        name=name, kind=name, unit="document", num_units=1, figures=(Figure(name="loss", value=value),)
    )


def model(name: str, seed: int | None, **recipe: Any) -> Section:
    training = Training(series=[], tokens=[], seconds=[], recipe=recipe, seed=seed)
    return Section(subject=name, training=training, results=[measured()])


def names(sections: list[Section]) -> list[list[str]]:
    return [[one.name, *(member.name for member in one.members)] for one in group(gather(sections))]


def test_a_model_is_what_all_sections_say_about_it() -> None:
    training = Training(series=[], tokens=[], seconds=[], recipe={}, seed=0)
    sections = [
        Section(subject="a", facts={"layers": "bmojo*4"}, training=training),
        Section(subject="other", facts={"layers": "x"}),
        Section(subject="a", facts={"evaluated in": "bf16"}, results=[measured()]),
        Section(subject="a", results=[measured("recall")]),
    ]
    (subject,) = gather(sections)
    assert subject.name == "a"
    assert subject.facts == {"layers": "bmojo*4", "evaluated in": "bf16"}
    assert subject.training is training
    assert list(subject.measured) == ["text", "recall"]
    assert [one.name for one in gather(sections, trained=["other"])] == ["a", "other"]


def test_a_measure_that_was_done_twice_makes_another_row() -> None:
    sections = [Section(subject="a", results=[measured(value=value)]) for value in (1.0, 2.0)]
    assert [(one.name, one.measured["text"].result.figures[0].value) for one in gather(sections)] == [
        ("a", 1.0),
        ("a (2)", 2.0),
    ]
    sections = [Section(subject="a", source=f"evaluate-{n}", results=[measured()]) for n in range(3)]
    sections.append(Section(subject="a", source="evaluate-1", results=[measured("recall")]))
    found = gather(sections)
    assert [one.name for one in found] == ["a", "a (evaluate-1)", "a (evaluate-2)"]
    assert list(found[0].measured) == ["text", "recall"]


def test_models_that_differ_in_their_seed_alone_are_one_group() -> None:
    sections = [
        model("train-bmojo-0", 0, lr=1e-3),
        model("train-swa-0", 0, lr=2e-3),
        model("train-bmojo-1", 1, lr=1e-3),
        model("train-bmojo-2", 2, lr=5e-3),
    ]
    assert names(sections) == [
        ["train-bmojo", "train-bmojo-0", "train-bmojo-1"],
        ["train-swa-0", "train-swa-0"],
        ["train-bmojo-2", "train-bmojo-2"],
    ]


def test_the_same_seed_twice_is_no_replicate() -> None:
    assert names([model("a/train", 0), model("b/train", 0)]) == [["a/train", "a/train"], ["b/train", "b/train"]]


def test_models_without_a_training_are_groups_of_their_own() -> None:
    sections = [Section(subject=name, results=[measured()]) for name in ("gpt2", "pythia")]
    assert names(sections) == [["gpt2", "gpt2"], ["pythia", "pythia"]]


def test_names_of_replicates_are_what_their_names_have_in_common() -> None:
    def common(*own: str) -> str:
        (one,) = group(gather([model(name, seed) for seed, name in enumerate(own)]))
        return one.name

    assert common("train-1", "train-12") == "train"
    assert common("seed-0-small", "seed-1-small") == "seed-small"
    assert common("runs-a/train", "runs-b/train") == "runs-train"
    assert common("x", "y") == "x"


def test_plots_leave_out_what_all_names_begin_with() -> None:
    one, other = group(gather([model("train-bmojo", 0, lr=1), model("train-swa", 0, lr=2)]))
    assert (one.short, other.short) == ("bmojo", "swa")
    (alone,) = group(gather([model("train-bmojo", 0)]))
    assert alone.short_label == "train-bmojo"
