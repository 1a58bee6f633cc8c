"""Products with few rows in Triton, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import gated_linear, linear, linear_each, triton_few_rows
from kernels.operator import use
from tests.kernels.helpers import normal, pairwise

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.mark.parametrize(
    ("leading", "size", "dtype"),
    pairwise([(1,), (8,), (3,), (2, 2), ()], [(16, 7), (33, 12), (1100, 5), (1, 1)], list(triton_few_rows.TOLERANCE)),
)
def test_products_are_those_of_torch(leading, size, dtype):
    """1,100 inputs take two blocks."""
    x, weight = normal(*leading, size[0], dtype=dtype), normal(size[1], size[0], dtype=dtype, seed=1)
    with use("triton"):
        assert linear.choose(x, weight).path == "triton"
        y = linear(x, weight)
    want = x.double() @ weight.double().t()
    assert y.shape == want.shape
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() <= triton_few_rows.TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("dtype", list(triton_few_rows.TOLERANCE))
@pytest.mark.parametrize("widths", [(7,), (9, 4), (1, 8, 5), (4, 4, 4)])
def test_projections_of_one_input_are_those_of_each_alone(widths, dtype):
    x = normal(3, 20, dtype=dtype)
    weights = tuple(normal(width, 20, dtype=dtype, seed=width + i) for i, width in enumerate(widths))
    with use("triton"):
        assert linear_each.choose(x, weights).path == "triton"
        together = linear_each(x, weights)
        for y, weight in zip(together, weights, strict=True):
            assert torch.equal(y, linear(x, weight))


@pytest.mark.parametrize("dtype", list(triton_few_rows.GATED_TOLERANCE))
@pytest.mark.parametrize(("leading", "num_in", "num_out"), [((1,), 20, 7), ((2, 3), 16, 8), ((8,), 1100, 5)])
def test_gated_products_are_those_of_torch(leading, num_in, num_out, dtype):
    x, weight = normal(*leading, num_in, dtype=dtype), normal(2 * num_out, num_in, dtype=dtype, seed=1)
    with use("triton"):
        assert gated_linear.choose(x, weight).path == "triton"
        y = gated_linear(x, weight)
    with use("torch"):
        want = gated_linear(x.double(), weight.double())
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() <= triton_few_rows.GATED_TOLERANCE[dtype] * want.abs().max()


def test_parts_of_wider_rows_are_read_right():
    x, weight = normal(3, 40)[:, 4:20], normal(7, 40, seed=1)[:, :16]
    with use("triton"):
        assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))
        assert torch.equal(linear(x.t().contiguous().t(), weight), linear(x.contiguous(), weight))


def test_a_row_is_the_same_bits_whatever_the_others_are():
    x, weight = normal(4, 24), normal(17, 24, seed=1)
    changed = x.clone()
    changed[1:] = float("nan")
    with use("triton"):
        assert torch.equal(linear(x, weight)[:1], linear(changed, weight)[:1])


def test_what_it_leaves_to_cublas():
    x, weight = normal(8, 4), normal(3, 4, seed=1)
    learned, transposed = weight.clone().requires_grad_(), normal(4, 3).t()
    for given in ((normal(9, 4), weight), (x, learned), (x.double(), weight), (x, transposed), (x[:0], weight)):
        with use("triton"):
            assert linear.choose(*given).path == "torch"
    with use("triton"), torch.no_grad():
        assert linear.choose(x, learned).path == "triton"
