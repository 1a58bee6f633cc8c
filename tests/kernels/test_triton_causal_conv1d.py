"""The Triton convolution, in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, triton_path

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value; see README.md


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def documents(batch: int, t: int) -> Tensor:
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < 0.2
    return starts.cumsum(1)


def run(
    path: str, x: Tensor, weight: Tensor, initial: Tensor | None, docs: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients, with the inputs in `dtype`."""
    leaves = [x.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()]
    initial = None if initial is None else initial.to(dtype)
    with dispatch.use(path):
        y, tail = causal_conv1d(*leaves, initial, docs)
    cotangent = normal(*y.shape, seed=9).to(x.dtype).to(dtype)
    grad_x, grad_weight = torch.autograd.grad(y, leaves, cotangent)
    return {"y": y, "tail": tail, "grad_x": grad_x, "grad_weight": grad_weight}


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in got.items():
        assert value.dtype == dtype, name
        assert value.shape == want[name].shape, name
        error = (value.double() - want[name]).abs().max()
        assert error <= TOLERANCE[dtype] * max(1.0, want[name].abs().max().item()), name


@pytest.mark.parametrize("past", ["none", "documents", "initial"])
@pytest.mark.parametrize(("t", "width"), [(1, 4), (2, 4), (3, 2), (8, 3), (21, 4), (16, 2)])
def test_outputs_and_gradients_match_the_reference(t, width, past):
    x, weight = normal(2, t, 40), normal(40, width, seed=1)
    initial = normal(2, width - 1, 40, seed=2) if past == "initial" else None
    docs = documents(2, t) if past == "documents" else None
    got = run("triton", x, weight, initial, docs, torch.float32)
    assert_agree(got, run("reference", x, weight, initial, docs, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, weight, initial = normal(2, 19, 6, dtype=dtype), normal(6, 4, dtype=dtype, seed=1), normal(2, 3, 6, dtype=dtype)
    got = run("triton", x, weight, initial, None, dtype)
    assert_agree(got, run("reference", x, weight, initial, None, torch.float64), dtype)


def test_a_slice_of_wider_rows_needs_no_copy_and_float32_weights_serve_bfloat16_rows():
    wide, weight = normal(2, 9, 11, dtype=torch.bfloat16), normal(5, 4, seed=1).requires_grad_()
    x = wide[..., 3:8].requires_grad_()
    with dispatch.use("triton"):
        y, _ = causal_conv1d(x, weight)
    with dispatch.use("reference"):
        want, _ = causal_conv1d(wide[..., 3:8].double(), weight.detach().double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).abs().max() < TOLERANCE[torch.bfloat16] * want.abs().max()
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    assert grad_x.dtype == torch.bfloat16
    assert grad_weight.dtype == torch.float32


def test_other_documents_do_not_leak_even_where_they_are_nan():
    x, weight = normal(1, 12, 4), normal(4, 4, seed=1)
    docs = torch.tensor([0] * 5 + [1] * 7)[None]
    spoilt = x.clone()
    spoilt[:, :5] = float("nan")
    got, want = (run("triton", z, weight, None, docs, torch.float32) for z in (spoilt, x))
    assert torch.equal(got["y"][:, 5:], want["y"][:, 5:])
    assert torch.equal(got["grad_x"][:, 5:], want["grad_x"][:, 5:])


def test_gradients_are_bitwise_the_same_every_time():
    x, weight = normal(3, 20, 4), normal(4, 4, seed=1)
    first, second = (run("triton", x, weight, None, None, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_sequence(width, dtype):
    x, weight, state = (
        normal(2, 6, 5, dtype=dtype),
        normal(5, width, dtype=dtype, seed=1),
        normal(2, width - 1, 5, dtype=dtype),
    )
    with dispatch.use("reference"):
        want, tail = causal_conv1d(x.double(), weight.double(), state.double())
    for path in ("torch", "triton"):
        stepped = state.clone()
        with dispatch.use(path):
            got = torch.stack([causal_conv1d_step(x[:, i], weight, stepped) for i in range(6)], 1)
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
        assert torch.equal(stepped.double(), tail)


@pytest.mark.parametrize("past", ["none", "documents", "initial"])
def test_operators_pass_opcheck(past):
    x, weight = normal(2, 5, 3).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    initial = normal(2, 3, 3) if past == "initial" else None
    docs = documents(2, 5) if past == "documents" else None
    torch.library.opcheck(triton_path.convolve, (x, weight, initial, docs))
    arguments = (x.detach(), weight.detach(), initial, docs, normal(2, 5, 3, seed=2))
    torch.library.opcheck(torch.ops.bmojo.causal_conv1d_backward.default, arguments)
    step = (normal(2, 3), weight.detach(), normal(2, 3, 3))
    torch.library.opcheck(triton_path.step, step)


def test_limits_are_named():
    x = normal(1, 3, 4)
    with dispatch.use("triton"):
        with pytest.raises(ValueError, match=r"bfloat16, float16 and float32, not torch\.float64"):
            causal_conv1d(x.double(), normal(4, 4).double())
        with pytest.raises(ValueError, match="2 to 4 taps, weight_dk has 5"):
            causal_conv1d(x, normal(4, 5))
        with pytest.raises(ValueError, match="x has 4 channels, but weight_dk has 3"):
            causal_conv1d(x, normal(3, 4))
        with pytest.raises(ValueError, match="state_bkd in place: it must be contiguous"):
            causal_conv1d_step(x[:, 0], normal(4, 4), normal(1, 4, 3).transpose(1, 2))
