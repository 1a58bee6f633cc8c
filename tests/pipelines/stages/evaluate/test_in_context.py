"""Learning in context: losses by the token's number in its document, against those of whole documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data.shards import read_token_documents
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures.in_context import InContextConfig, InContextMeasure
from pipelines.stages.evaluate.measures.in_context_work import token_bins
from pipelines.stages.evaluate.validation import validation_split
from tests.pipelines.stages.evaluate.here import measure_here, setting_of
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model

EARLY, LATE, LENGTH = 5, 60, 100
CONFIG = InContextConfig(early=EARLY, late=LATE, num_tokens=LENGTH)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


def losses(model: NativeModel, tokens: Tokens) -> np.ndarray:
    """Of the first LENGTH tokens of each document that has them."""
    rows = []
    for ids in read_token_documents(validation_split(tokens)):
        whole = torch.tensor([tokens.output.eod_id, *ids.tolist()])[None]
        if len(ids) >= LENGTH:
            with torch.no_grad():
                rows.append(model.token_losses(whole[:, :-1], whole[:, 1:])[0, :LENGTH].double().numpy())
    return np.stack(rows)


def test_the_score_is_the_difference_of_two_tokens_averaged_over_documents(tokens: Tokens) -> None:
    model = NativeModel(tiny_model())
    nll_nt = losses(model, tokens)
    found = measure_here(CONFIG, setting_of(tokens, batch_size=2), model)
    assert found.result.num_units == len(nll_nt) > 5
    (score,) = found.result.figures
    assert score.value == pytest.approx((nll_nt[:, LATE - 1] - nll_nt[:, EARLY - 1]).mean(), rel=1e-4)
    assert score.low is not None
    assert score.high is not None
    assert score.low < score.value < score.high


def test_the_curve_is_the_mean_of_each_bin(tokens: Tokens) -> None:
    model = NativeModel(tiny_model())
    nll_nt = losses(model, tokens)
    (curve,) = measure_here(CONFIG, setting_of(tokens), model).result.curves
    ends = token_bins(LENGTH)
    assert ends[0] == 1
    assert ends[-1] == LENGTH
    assert len(curve.points) == len(ends)
    assert (curve.points[0].x, curve.points[0].y) == (1, pytest.approx(nll_nt[:, 0].mean(), rel=1e-5))
    last = nll_nt[:, ends[-2] : LENGTH].mean()
    assert (curve.points[-1].x, curve.points[-1].y) == ((ends[-2] + 1 + LENGTH) / 2, pytest.approx(last, rel=1e-5))


def test_documents_are_taken_from_all_texts_in_turn(tokens: Tokens, tmp_path: Path) -> None:
    other = write_tokens(tmp_path, "other", first=100)
    some = CONFIG.model_copy(update={"max_documents": 6})
    tasks = InContextMeasure().tasks(some, setting_of(tokens, other))
    assert [(task.key, len(task.work.starts)) for task in tasks] == [("0-000000", 3), ("1-000000", 3)]  # type: ignore[attr-defined]
    assert measure_here(some, setting_of(tokens, other), NativeModel(tiny_model())).result.num_units == 6


def test_without_long_documents_it_says_so(tokens: Tokens) -> None:
    found = measure_here(InContextConfig(num_tokens=10_000), setting_of(tokens), NativeModel(tiny_model()))
    assert found.result.figures == ()
    assert found.result.notes == ("Learning in context: no validation document has 10,000 tokens.",)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="early must be less than late"):
        InContextConfig(early=500, late=50)
    with pytest.raises(ValidationError, match="does not reach late=500"):
        InContextConfig(num_tokens=400)
    assert InContextConfig().length(512) == 512
    assert InContextConfig().length(64) == 500
