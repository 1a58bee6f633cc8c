"""The Triton convolution, in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, triton_path
from kernels.operator import use
from tests.kernels.causal_conv1d.convolutions import PASTS, past, run_conv
from tests.kernels.helpers import assert_close, assert_same_bits, normal

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value; see README.md


@pytest.mark.parametrize("kind", PASTS)
@pytest.mark.parametrize(
    ("t", "width"),
    [(1, 4), (2, 3), (3, 2), (21, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((8, 3), (16, 2)))],
)
def test_outputs_and_gradients_match_the_reference(t, width, kind):
    assert_matches_reference(t, 40, width, kind, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    assert_matches_reference(19, 6, 4, "initial", dtype)


def assert_matches_reference(t: int, d: int, width: int, kind: str, dtype: torch.dtype) -> None:
    x, weight = normal(2, t, d, dtype=dtype), normal(d, width, dtype=dtype, seed=1)
    given = past(kind, t, d, width, dtype)
    got = run_conv("triton", x, weight, *given)
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, run_conv("reference", x, weight, *given, torch.float64), TOLERANCE)


def test_a_slice_of_wider_rows_needs_no_copy_and_float32_weights_serve_bfloat16_rows():
    wide, weight = normal(2, 9, 11, dtype=torch.bfloat16), normal(5, 4, seed=1).requires_grad_()
    x = wide[..., 3:8].requires_grad_()
    with use("triton"):
        y, _ = causal_conv1d(x, weight)
    with use("reference"):
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
    got, want = (run_conv("triton", z, weight, None, docs) for z in (spoilt, x))
    assert torch.equal(got["out0"][:, 5:], want["out0"][:, 5:])
    assert torch.equal(got["dx"][:, 5:], want["dx"][:, 5:])


def test_gradients_are_bitwise_the_same_every_time():
    x, weight = normal(3, 20, 4), normal(4, 4, seed=1)
    assert_same_bits(run_conv("triton", x, weight), run_conv("triton", x, weight))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_sequence(width, dtype):
    x, weight, state = (
        normal(2, 6, 5, dtype=dtype),
        normal(5, width, dtype=dtype, seed=1),
        normal(2, width - 1, 5, dtype=dtype),
    )
    with use("reference"):
        want, tail = causal_conv1d(x.double(), weight.double(), state.double())
    for path in ("torch", "triton"):
        stepped = state.clone()
        with use(path):
            got = torch.stack([causal_conv1d_step(x[:, i], weight, stepped) for i in range(6)], 1)
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
        assert torch.equal(stepped.double(), tail)


@pytest.mark.parametrize("kind", ["documents", "initial"])
def test_operators_pass_opcheck(kind):
    x, weight = normal(2, 5, 3).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    initial, docs = past(kind, 5, 3, 4)
    torch.library.opcheck(triton_path.convolve, (x, weight, initial, docs))
    arguments = (x.detach(), weight.detach(), initial, docs, normal(2, 5, 3, seed=2))
    torch.library.opcheck(torch.ops.bmojo.causal_conv1d_backward.default, arguments)


def test_the_step_passes_opcheck():
    torch.library.opcheck(triton_path.step, (normal(2, 3), normal(3, 4, seed=1), normal(2, 3, 3)))


def test_limits_are_named():
    x = normal(1, 3, 4)
    with use("triton"):
        with pytest.raises(ValueError, match=r"bfloat16, float16 and float32, not torch\.float64"):
            causal_conv1d(x.double(), normal(4, 4).double())
        with pytest.raises(ValueError, match="2 to 4 taps, weight_dk has 5"):
            causal_conv1d(x, normal(4, 5))
        with pytest.raises(ValueError, match="x has 4 channels, but weight_dk has 3"):
            causal_conv1d(x, normal(3, 4))
        with pytest.raises(ValueError, match="state_bkd in place: it must be contiguous"):
            causal_conv1d_step(x[:, 0], normal(4, 4), normal(1, 4, 3).transpose(1, 2))
