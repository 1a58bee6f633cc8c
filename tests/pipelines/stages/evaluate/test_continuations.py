"""Scores of continuations against products of the model's own probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo import BMojoLM, ModelConfig
from pipelines.stages.evaluate import continuations
from pipelines.stages.evaluate.continuations import Continuation, score_continuations, score_texts
from pipelines.stages.evaluate.language_model import Drawing, NativeModel

VOCAB = 20


@pytest.fixture(scope="module")
def model() -> NativeModel:
    config = ModelConfig(
        pattern="bmojo,swa", vocab_size=VOCAB, d_model=16, num_heads=2, window_size=4, chunk_size=2, num_eidetic=2,
        d_state=4, ssm_head_dim=8, init_std=0.3,
    )  # fmt: skip
    return NativeModel(BMojoLM(config).eval())


@torch.no_grad()
def one_by_one(model: NativeModel, context: list[int], ids: list[int]) -> tuple[float, bool]:
    logits = model.module(torch.tensor([context + ids])).logits_btv[0, len(context) - 1 : -1]
    picked = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    return float(picked.sum()), bool((logits.argmax(-1) == torch.tensor(ids)).all())


IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=9), batch_tokens=st.integers(1, 60))
def test_scores_are_those_of_each_continuation_alone(
    model: NativeModel, pairs: list[tuple[list[int], list[int]]], batch_tokens: int
) -> None:
    scores = score_continuations(model, [Continuation(*pair) for pair in pairs], batch_tokens)
    for score, pair in zip(scores, pairs, strict=True):
        logprob, is_greedy = one_by_one(model, *pair)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.is_greedy == is_greedy


def test_what_greedy_decoding_writes_is_greedy(model: NativeModel) -> None:
    prompt = [3, 1, 4]
    written = [int(token) for token in model.generate(torch.tensor([prompt]), Drawing(5, temperature=0))]
    wrong = [*written[:-1], (written[-1] + 1) % VOCAB]
    scores = score_continuations(model, [Continuation(prompt, written), Continuation(prompt, wrong)], 100)
    assert [score.is_greedy for score in scores] == [True, False]


def test_a_long_context_is_cut_on_the_left(model: NativeModel) -> None:
    context, ids = [1, 2, 3, 4, 5, 6], [7, 8]
    (cut,) = score_continuations(model, [Continuation(context, ids)], 100, max_tokens=4)
    assert cut.logprob == pytest.approx(one_by_one(model, context[-3:], ids)[0], abs=1e-4)


@pytest.mark.parametrize(("context", "ids", "limit"), [([], [1], None), ([1], [], None), ([1], [1, 2, 3], 2)])
def test_what_cannot_be_scored_is_an_error(model: NativeModel, context: list[int], ids: list[int], limit: int) -> None:
    with pytest.raises(ValueError, match="continuation 0 has"):
        score_continuations(model, [Continuation(context, ids)], 10, limit)


def test_nothing_to_score_is_nothing(model: NativeModel) -> None:
    assert score_continuations(model, [], 10) == []
    assert score_texts(model, [], 10) == []


def test_few_logits_are_held_at_once(model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "MAX_LOGITS", 5 * VOCAB)
    seen: list[int] = []
    real: Callable[..., torch.Tensor] = NativeModel.logits_at

    def logits_at(self: NativeModel, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return real(self, tokens, rows, columns)

    monkeypatch.setattr(NativeModel, "logits_at", logits_at)
    score_continuations(model, [Continuation([1], [2, 3])] * 7, 1000)
    assert max(seen) <= 5
    assert sum(seen) == 14


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(IDS, min_size=1, max_size=5), batch_tokens=st.integers(1, 60), limit=st.integers(2, 14))
def test_windows_of_texts_score_every_token_once(
    model: NativeModel, texts: list[list[int]], batch_tokens: int, limit: int
) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    totals = score_texts(model, [Continuation([0], ids) for ids in texts], batch_tokens, limit)
    for total, ids in zip(totals, texts, strict=True):
        windows = map(make_disjoint_window, get_rolling_token_windows(ids, 0, limit, 1))
        assert total == pytest.approx(sum(one_by_one(model, *window)[0] for window in windows), abs=1e-3)
