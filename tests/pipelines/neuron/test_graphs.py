"""The graphs of a training step: those of every model are clean, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipelines.neuron.checks.graphs import Recorder, findings, fresh_compiler, graphs_of
from pipelines.neuron.checks.op_table import op_table
from tests.bmojo.model_family import small_config


def test_the_graphs_of_every_mixer_are_clean():
    """One forward and one backward each, of listed operators, in fixed shapes, with float32 where it is needed."""
    mixers = ["attention", "swa", "mamba", "mamba2", "gated_deltanet", "bmojo_f", "bmojo"]
    config = small_config(pattern=",".join(mixers), window_size=128, chunk_size=64)
    graphs = graphs_of(config, seq_len=512, batch=1, documents=True)
    assert sorted(graph.name for graph in graphs) == sorted(
        f"{part} {direction}" for part in [*mixers, "loss"] for direction in ("forward", "backward")
    )
    assert findings(graphs, op_table()) == []


def found(function: Callable[[Tensor], Tensor], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with the graphs of a function that is called with these shapes."""
    recorder = Recorder()
    with fresh_compiler():
        compiled = recorder.compile("part", function)
        for shape in shapes:
            compiled(torch.zeros(shape, dtype=dtype).requires_grad_()).sum().backward()
    return "\n".join(findings(recorder.graphs, op_table()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * 2, ""),
        (lambda x: x.cumprod(0), "part forward: aten.cumprod.default (1 times) is on the deny list: the device has no"),
        (lambda x: torch.erf(x), "part forward: aten.erf.default (1 times) is not in the op table"),
        (lambda x: (x.double() * 2).float(), "is torch.float64; the device has no such numbers"),
        (lambda x: x.bfloat16().exp().float(), "is computed in bfloat16; it needs float32"),
        (lambda x: torch.stack(x.split(2)), "aten.split.Tensor (1 times) is on the deny list"),
        (lambda x: x * x.sum().item(), "is torch.float64; the device has no such numbers"),
        (lambda x: x[x > 0], "aten.index.Tensor (1 times) is on the deny list: its shape depends on values"),
    ],
    ids=["none", "deny list", "unknown", "float64", "bfloat16", "split", "item", "boolean index"],
)
def test_a_planted_operator_is_found(function, message):
    lines = found(function, (4, 3))
    assert message in lines
    assert bool(lines) == bool(message)


def test_a_changing_shape_is_found():
    assert "part forward: compiled 2 times; a shape" in found(lambda x: x * 2, (4, 3), (5, 3))
