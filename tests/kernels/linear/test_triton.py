"""Products on a GPU: with few rows, and cut into parts; in the interpreter, or with TRITON_INTERPRET=0 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.again import making_again
from kernels.linear import (
    gated_linear,
    gated_norm_linear,
    linear,
    linear_each,
    linear_parts,
    swiglu,
    triton_few_rows,
    triton_path,
)
from kernels.operator import use
from kernels.pointwise import gated_product, gated_rms_norm
from tests.kernels.helpers import assert_close, normal, pairwise, run

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
    for given in (
        (normal(9, 4), weight),
        (x.bfloat16(), learned),
        (x[0], learned),
        (x.double(), weight),
        (x, transposed),
        (x[:0], weight),
    ):
        with use("triton"):
            assert linear.choose(*given).path == "torch"
    with use("triton"), torch.no_grad():
        assert linear.choose(x, learned).path == "triton"


@pytest.mark.parametrize(
    ("shape", "widths", "used", "dtype"),
    pairwise(
        [(2, 5, 8), (3, 12), (1, 1, 1)],
        [(3, 3, 1), (16, 8, 8), (1, 20, 5)],
        [[0, 1, 2], [1], [0, 2]],
        [torch.float32, torch.bfloat16],
    ),
)
def test_parts_and_gradients(shape, widths, used, dtype):
    inputs = {"x": normal(*shape, dtype=dtype), "weight": normal(sum(widths), shape[-1], dtype=dtype, seed=1)}

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        parts = linear_parts(x, weight, widths)
        return tuple(parts[i] for i in used)

    assert_close(run("triton", call, inputs), run("torch", call, inputs, torch.float64), triton_path.TOLERANCE)


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
        assert linear_parts.choose(torch.zeros(triton_path.MANY_ROWS - 1, 8), weight, (3, 3, 1)).path == "torch"
        assert linear_parts.choose(torch.zeros(triton_path.MANY_ROWS, 8), weight, (3, 3, 1)).path == "triton"
        assert linear_parts.choose(torch.zeros(1, 8), weight.requires_grad_(), (3, 3, 1)).path == "triton"


class Differentiated(NamedTuple):
    """Results and gradients of a call, and the bytes that were kept for them, beside its inputs."""

    tensors: list[Tensor]
    kept_bytes: int


def differentiated(call: Callable[..., Tensor], *inputs: Tensor) -> Differentiated:
    leaves = [x.detach().requires_grad_() for x in inputs]
    own = {x.untyped_storage().data_ptr() for x in leaves}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with use("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(*leaves)
    grads = torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(y))
    return Differentiated([y.detach(), *grads], sum(storage.nbytes() for storage in kept.values()))


def assert_same_bits(one: Differentiated, other: Differentiated) -> None:
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("small_again", [False, True])
def test_training_has_the_bits_of_torch_and_keeps_no_copy_of_first_rows(autocast, small_again):
    x, weight = normal(3, 7, 24), normal(9, 24, seed=1)

    def call(operator: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def of(x: Tensor, weight: Tensor) -> Tensor:
            precision = torch.autocast(x.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False)
            with precision, making_again("small" if small_again else "duplicates"):
                return operator(x[:, :5], weight)

        return of

    ours, torchs = differentiated(call(linear), x, weight), differentiated(call(torch.nn.functional.linear), x, weight)
    assert_same_bits(ours, torchs)
    assert ours.kept_bytes == (2 * 3 * 5 * 24 + (0 if small_again else 2 * 9 * 24) if autocast else 0)
    assert torchs.kept_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_is_not_kept_for_the_projection_of_it(dtype):
    x, gate_up, down = normal(2, 5, 8, dtype=dtype), normal(12, 8, dtype=dtype), normal(7, 6, dtype=dtype, seed=2)
    fused = differentiated(swiglu, x, gate_up, down)
    alone = differentiated(lambda x, gate_up, down: linear(gated_product(linear(x, gate_up)), down), x, gate_up, down)
    assert_same_bits(fused, alone)
    assert fused.kept_bytes == 10 * 12 * dtype.itemsize
    assert alone.kept_bytes == fused.kept_bytes + 10 * 6 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_norm_is_not_kept_for_the_projection_of_it(dtype):
    """In float32 a product in another order would have other bits."""
    x, gate = normal(3, 70, 24, dtype=dtype), normal(3, 70, 24, dtype=dtype, seed=1)
    norm_weight, weight = normal(24, seed=2), normal(7, 24, dtype=dtype, seed=3)
    fused = differentiated(lambda *given: gated_norm_linear(*given[:3], 1e-5, given[3]), x, gate, norm_weight, weight)
    alone = differentiated(
        lambda *given: linear(gated_rms_norm(*given[:3], 1e-5), given[3]), x, gate, norm_weight, weight
    )
    assert_same_bits(fused, alone)
    assert fused.kept_bytes == 4 * 3 * 70  # a number per row
    assert alone.kept_bytes == fused.kept_bytes + x.numel() * dtype.itemsize


def test_training_leaves_what_it_cannot_do_to_torch():
    weight = normal(3, 4).requires_grad_()
    for x in (normal(2, 4).bfloat16(), normal(4), normal(2, 4).double(), normal(0, 4)):
        with use("triton"):
            assert linear.choose(x, weight).path == "torch"
