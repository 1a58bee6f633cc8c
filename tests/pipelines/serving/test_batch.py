"""Rows of a batch: each computes the same bits, wherever it stands and whoever is beside it."""

from __future__ import annotations

import pytest
import torch

from pipelines.serving.batch import Batch, rounded
from pipelines.serving.context import Context, Reading
from tests.pipelines.serving.engines import odd_model
from tests.pipelines.stages.trained_run import tiny_model

MIXERS = ("attention", "swa", "mamba2", "mamba", "gated_deltanet", "kda", "mamba3", "bmojo_f", "bmojo")


def context_of(model: object, tokens: list[int]) -> Context:
    reading = Reading(model, None, tokens, piece_tokens=8)  # type: ignore[arg-type]
    while not reading.is_done:
        reading.advance()
    assert reading.context is not None
    return reading.context


@pytest.mark.ci
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_is_the_same_bits_wherever_it_stands(mixer: str) -> None:
    model = odd_model(f"{mixer}*2")
    batch = Batch(model, rounded(model, 12), context_tokens=100)
    first = context_of(model, [5, 9, 200, 31, 7] * 5)
    others = [context_of(model, list(range(2, 4 + n))) for n in range(batch.num_rows)]
    alone = batch.join(first)
    expected = [batch.step({alone: 40 + t})[alone].clone() for t in range(6)]
    batch.leave(alone)
    rows = [batch.join(first if n % 3 == 2 else others[n]) for n in range(batch.num_rows)]
    assert batch.num_free == 0
    for t in range(6):
        logits_bv = batch.step({row: 40 + t if n % 3 == 2 else 7 * n + t for n, row in enumerate(rows)})
        for row in rows[2::3]:
            assert torch.equal(logits_bv[row], expected[t]), (t, row)


def test_rows_are_rounded_to_whole_vectors_of_gates() -> None:
    assert rounded(odd_model("mamba2"), 16) == 32  # 3 heads
    assert rounded(tiny_model("mamba2"), 16) == 16  # 4 heads
    assert rounded(tiny_model("swa"), 5) == 5


def test_rows_that_are_left_are_used_again_and_idle_ones_stay_at_the_beginning() -> None:
    model = tiny_model("attention,bmojo")
    batch = Batch(model, 2, context_tokens=30)
    for _ in range(3):
        row = batch.join(context_of(model, list(range(20))))
        for t in range(10):
            batch.step({row: t})
        batch.leave(row)
    row = batch.join(context_of(model, [1, 2]))
    again = batch.step({row: 3})[row]
    fresh = Batch(model, 2, context_tokens=30)
    row = fresh.join(context_of(model, [1, 2]))
    assert torch.equal(fresh.step({row: 3})[row], again)
