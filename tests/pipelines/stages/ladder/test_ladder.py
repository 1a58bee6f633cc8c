"""A ladder's output, its words and its plot; and what a pipeline file may ask of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.loading import load_pipeline
from pipelines.stages.ladder.config import Target
from pipelines.stages.ladder.fitting import fitted_output
from pipelines.stages.ladder.stage import LadderOutput, LadderPoint, law_of
from pipelines.stages.report.fit_plots import draw_law
from tests.pipelines.refusals import refusal

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


def made(num: int, noise: float = 0.002) -> list[LadderPoint]:
    rng = np.random.default_rng(0)
    return [
        LadderPoint(
            name=f"size-{n}", flops=1e15 * 4**n, num_params=10**6 * 2**n, tokens=10**7 * 2**n,
            loss=(1.7 + 2 * 4 ** (-0.15 * n)) * float(np.exp(rng.normal(0, noise))),
        )
        for n in range(num)
    ]  # fmt: skip


def output(num: int = 6) -> LadderOutput:
    return fitted_output(made(num)[::-1], "evaluation", [("next", 1e19)])


def test_it_predicts_and_checks_itself_against_the_largest() -> None:
    found = output()
    (prediction,) = found.predictions
    assert prediction.loss.low < 1.7 + 2 * 1e4**-0.15 < prediction.loss.high
    assert found.check is not None
    assert (found.check.name, found.check.measured) == ("size-5", made(6)[-1].loss)
    assert "size-5 is predicted by the smaller ones" in " ".join(law_of("ladder", found).table.notes)
    assert found.figures()["ladder/exponent"] == pytest.approx(0.15, abs=0.05)
    assert LadderOutput.model_validate_json(found.model_dump_json()) == found


def test_four_sizes_leave_none_for_a_check() -> None:
    assert output(4).check is None
    assert output(4).predictions


def test_without_a_law_there_is_no_figure_but_words() -> None:
    level = [point.model_copy(update={"loss": 3.0 + 0.01 * n}) for n, point in enumerate(made(5))]
    found = fitted_output(level, "evaluation", [("next", 1e19)])
    assert (found.exponent, found.predictions, found.curve, found.figures()) == (None, (), (), {})
    assert "does not fall with compute" in str(found.summary())
    law = law_of("ladder", found)
    assert "There is no law" in law.table.notes[0]
    assert "There is no law" in draw_law(law).note


def test_the_plot_shows_every_size_and_prediction_and_is_the_same_again() -> None:
    law = law_of("ladder", output())
    picture = draw_law(law)
    assert all(name in picture.svg for name in ("size-0", "size-5", "next"))
    assert draw_law(law).svg == picture.svg
    assert picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 5}, {"flops": 1e9, "max_tokens": 5}, {"flops": -1.0}])
def test_a_target_is_flops_or_a_model_with_tokens(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target.model_validate(fields)


def test_the_example_reads_all_sizes_and_evaluations() -> None:
    (ladder,) = (node for node in load_pipeline(CONFIGS / "ladder.yaml").graph() if node.stage.kind == "ladder")
    assert len(ladder.inputs.trained) == len(ladder.inputs.evaluated) == 6


def test_too_few_sizes_and_missing_evaluations_are_refused() -> None:
    file = CONFIGS / "ladder.yaml"
    few = refusal(file, "ladder.needs=[train-d32, train-d48]")
    assert "found 2 train stages, expected 4 or more" in few
    missing = refusal(file, "ladder.needs=[train-d32, train-d48, train-d64, train-d96, evaluate-d32]")
    assert "evaluations of 1 of 4 models" in missing
