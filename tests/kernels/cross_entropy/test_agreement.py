"""The loss in chunks of logits against its definition."""

from __future__ import annotations

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy, torch_path
from kernels.cross_entropy.reference import IGNORED
from kernels.cross_entropy.torch_path import TOLERANCE
from tests.kernels.helpers import assert_close, normal, run

ROUNDED = {torch.bfloat16: 2**-7, torch.float32: 2**-7}  # logits have eight bits, whatever the results have


@pytest.mark.parametrize("path", ["torch", "static"])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 21, 40])  # one short chunk; one; three; five and a short one
def test_loss_and_gradients_in_chunks_agree_with_the_reference(num_tokens, dtype, path, nan_memory, monkeypatch):
    monkeypatch.setattr(torch_path, "MIN_ROWS", 7)
    monkeypatch.setattr(torch_path, "CHUNK_LOGITS", 7 * 23)
    target_s = (torch.arange(num_tokens) * 5 % 23).masked_fill(torch.arange(num_tokens) % 4 == 3, IGNORED)
    inputs = {"hidden": normal(num_tokens, 12, dtype=dtype), "weight": normal(23, 12, seed=1, dtype=dtype) / 4}

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, target_s, 0.1)[:2]

    got, want = run(path, loss, inputs), run("reference", loss, inputs, torch.float64)
    assert_close(got, want, ROUNDED if dtype == torch.bfloat16 else TOLERANCE)
