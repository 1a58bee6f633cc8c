"""Projections cut into parts on a GPU: outputs and gradients, whatever the widths, dtypes and rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear import linear_parts
from kernels.linear.triton_path import MANY_ROWS, TOLERANCE
from kernels.operator import use
from tests.kernels.helpers import assert_close, normal, pairwise, run


@pytest.mark.parametrize(
    ("shape", "widths", "used", "dtype"),
    pairwise(
        [(2, 5, 8), (3, 12), (1, 1, 1)],
        [(3, 3, 1), (16, 8, 8), (1, 20, 5)],
        [[0, 1, 2], [1], [0, 2]],
        [torch.float32, torch.bfloat16],
    ),
)
def test_parts_and_gradients(shape, widths, used, dtype, nan_memory):
    inputs = {"x": normal(*shape, dtype=dtype), "weight": normal(sum(widths), shape[-1], dtype=dtype, seed=1)}

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        parts = linear_parts(x, weight, widths)
        return tuple(parts[i] for i in used)

    assert_close(run("triton", call, inputs), run("torch", call, inputs, torch.float64), TOLERANCE)


def test_under_autocast_gradients_have_the_parameters_dtype():
    x, weight = normal(6, 8).requires_grad_(), normal(7, 8, seed=1).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16), use("triton"):
        parts = linear_parts(x, weight, (3, 3, 1))
    assert {part.dtype for part in parts} == {torch.bfloat16}
    torch.cat(parts, -1).sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(7, 8), rtol=2e-2, atol=2e-2)


def test_a_weight_is_copied_only_where_that_pays():
    weight = torch.zeros(7, 8)
    with use("triton"):
        assert linear_parts.choose(torch.zeros(MANY_ROWS - 1, 8), weight, (3, 3, 1)).path == "torch"
        assert linear_parts.choose(torch.zeros(MANY_ROWS, 8), weight, (3, 3, 1)).path == "triton"
        assert linear_parts.choose(torch.zeros(1, 8), weight.requires_grad_(), (3, 3, 1)).path == "triton"
