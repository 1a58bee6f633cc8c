"""Continuations of prompts: side by side as alone, whole as piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bmojo import to_bfloat16
from pipelines.stages.evaluate import language_model
from pipelines.stages.evaluate.language_model import Drawing, NativeModel
from pipelines.stages.evaluate.sampling import continue_text, continue_texts
from tests.pipelines.stages.trained_run import tiny_model, tiny_tokenizer

PROMPTS = ("", "def function", "x")


@pytest.mark.parametrize("bf16", [False, True])
def test_prompts_side_by_side_are_continued_as_alone(bf16: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if bf16:
        to_bfloat16(model)
    drawing = Drawing(12, temperature=0.0, top_k=None, top_p=None, seed=0)
    alone = ["".join(continue_text(model, tokenizer, prompt, drawing)) for prompt in PROMPTS]
    assert continue_texts(NativeModel(model), tokenizer, PROMPTS, drawing) == alone
    assert all(alone)


def test_a_text_drawn_whole_is_the_one_drawn_piece_by_piece() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    drawing = Drawing(40, temperature=1.0, top_k=50, top_p=0.9, seed=3)
    pieces = "".join(continue_text(model, tokenizer, "def", drawing))
    assert continue_texts(NativeModel(model), tokenizer, ["def"], drawing) == [pieces]


def test_a_token_is_read_after_the_next_one_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def generate(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for number in range(3):
            begun.append(number)
            yield torch.tensor([100 + number])

    monkeypatch.setattr(language_model, "generate", generate)
    drawing = Drawing(3, temperature=1.0, top_k=None, top_p=None, seed=0)
    pieces = continue_text(tiny_model(), tiny_tokenizer(), "", drawing)
    next(pieces)
    assert begun == [0, 1]
    assert len(list(pieces)) == 3  # two tokens, and the end of what is no whole character
    assert begun == [0, 1, 2]
