"""Bounds for figures: what closes a gate, and what is refused before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import EvaluateInputs, EvaluateStage
from tests.pipelines.stages.evaluate.here import trained_on
from tests.pipelines.stages.evaluate.results import EVALUATION, TEXT, output
from tests.pipelines.stages.train.training import write_tokens


def config(figures: dict[str, Any], **fields: Any) -> EvaluateStageConfig:
    return EvaluateStageConfig.model_validate({"kind": "evaluate", "gate": {"figures": figures, **fields}})


def reason(figures: dict[str, Any]) -> str | None:
    gate = EvaluateStage().closed_gate(config(figures), EVALUATION)
    return gate and gate.reason


def test_a_figure_beyond_its_bound_closes_the_gate_with_the_reason() -> None:
    assert reason({"text/loss": {"max": 3.21}, "text/perplexity": {"min": 10, "max": 30}}) is None
    assert reason({"text/loss": {"max": 3.2}}) == "text/loss is 3.21 \u00b1 0.11, above its max of 3.2"
    assert reason({"text/loss": {"max": 3}, "text/perplexity": {"min": 30}}) == (
        "text/loss is 3.21 \u00b1 0.11, above its max of 3; text/perplexity is 24.8 (22.2 to 27.7), below its min of 30"
    )


def test_what_is_no_number_or_was_not_found_is_within_no_bounds() -> None:
    hopeless = TEXT.model_copy(update={"figures": (TEXT.figures[1].model_copy(update={"value": math.nan}),)})
    gate = EvaluateStage().closed_gate(config({"text/loss": {"max": 9}}), output(hopeless))
    assert gate is not None
    assert gate.reason == "text/loss is not a number"
    assert reason({"position/loss_within": {"max": 9}}) == "position/loss_within was not found"


def test_the_action_says_whether_the_stage_fails() -> None:
    for action, fails in (("stop", False), ("fail", True)):
        gate = EvaluateStage().closed_gate(config({"text/loss": {"max": 1}}, action=action), EVALUATION)
        assert gate is not None
        assert gate.fails is fails
    assert EvaluateStage().closed_gate(EvaluateStageConfig(kind="evaluate"), EVALUATION) is None


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({}, "at least 1 item"),
        ({"text/loss": {}}, "found neither min nor max"),
        ({"text/loss": {"min": 2, "max": 1}}, "found min=2 above max=1"),
        ({"text/loss": {"most": 2}}, "most"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(figures: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(figures)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("text/los", "measure 'text' finds no such figure. Did you mean 'text/loss'?"),
        ("text/accuracy", "measure 'text' finds no such figure."),
        ("loss", "there is no measure 'loss'. Known: position, samples, text."),
        ("samples/loss", "measure 'samples' finds no such figure."),
    ],
)
def test_figures_that_will_not_be_found_are_refused_before_the_start(tmp_path: Path, path: str, problem: str) -> None:
    tokens = write_tokens(tmp_path)
    inputs = EvaluateInputs(trained=trained_on(tmp_path, tokens), tokens=(tokens,))
    EvaluateStage().check("evaluate", config({"text/loss": {"max": 1}, "position/loss_beyond": {"max": 1}}), inputs)
    with pytest.raises(FieldError) as caught:
        EvaluateStage().check("evaluate", config({path: {"max": 1}}), inputs)
    assert caught.value.field == ("stages", "evaluate", "gate", "figures", path)
    assert caught.value.problem.startswith(problem)
