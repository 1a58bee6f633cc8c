"""The whole model is one graph to torch.compile, and computes what it computes without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bmojo.mixers import MIXERS
from kernels.operator import use
from tests.bmojo.model_family import build, random_tokens, small_config


def loss_and_gradients(call: nn.Module, model: nn.Module, tokens: Tensor, docs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = call(tokens, tokens, docs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("path", "dtype", "tolerance"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)]
)
def test_the_whole_model_compiles_without_a_graph_break(path, dtype, tolerance):
    """Tolerances are relative to the largest gradient of a parameter: rounding grows with the terms that are added."""
    config = small_config(pattern=",".join(MIXERS), window_size=4, innovation_predictor="learned", d_ff=8)
    model = build(config, dtype=dtype)
    tokens, docs = random_tokens(2, 8), torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
    with use(path):
        eager = loss_and_gradients(model, model, tokens, docs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = loss_and_gradients(compiled, model, tokens, docs)
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name
