"""Speed of decoding and size of the state by position."""

from __future__ import annotations

import pytest

from pipelines.stages.evaluate.language_model import LanguageModel, NativeModel
from pipelines.stages.evaluate.measures.decoding import DecodingConfig, DecodingMeasure
from pipelines.stages.evaluate.results import MeasureResult
from tests.pipelines.stages.evaluate.here import measure_here, setting_of
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model

CONFIG = DecodingConfig(positions=(8, 100), rows=2, num_steps=5)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


def measured(tokens: Tokens, model: LanguageModel) -> MeasureResult:
    return measure_here(CONFIG, setting_of(tokens), model).result


def sizes(result: MeasureResult) -> list[float]:
    (curve,) = (curve for curve in result.curves if curve.name == "state_bytes")
    return [point.y for point in curve.points]


def test_the_state_is_constant_but_for_full_attention(tokens: Tokens) -> None:
    model = tiny_model()
    constant = sizes(measured(tokens, NativeModel(model)))
    assert constant == [model.init_state(1).num_bytes()] * 2
    near, far = sizes(measured(tokens, NativeModel(tiny_model("attention*2"))))
    assert far > 2 * near


def test_every_figure_that_is_promised_is_found_and_positive(tokens: Tokens) -> None:
    result = measured(tokens, NativeModel(tiny_model()))
    assert {figure.name for figure in result.figures} == DecodingMeasure().figure_names(CONFIG, setting_of(tokens))
    assert all(figure.value > 0 for figure in result.figures)
    assert [point.x for point in result.curves[0].points] == [8, 100]


def test_a_model_without_a_state_of_ours_is_not_measured(tokens: Tokens) -> None:
    class Other:
        """Neither more nor less than the work asks of it."""

    result = measured(tokens, Other())  # type: ignore[arg-type]
    assert (result.figures, result.curves) == ((), ())
    assert "only models of ours" in result.notes[0]
