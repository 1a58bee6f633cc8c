"""What rounding to float8 means: against numbers written by hand, float64 products, and bounds of its error."""

from __future__ import annotations

import pytest
import torch

from kernels.float8_linear import float8_linear
from kernels.float8_linear.reference import FORWARD, GRADIENT, rounded
from kernels.float8_linear.torch_path import TOLERANCE, quantize
from kernels.linear import linear
from kernels.operator import use
from tests.kernels.helpers import assert_close, normal, run

HALF_UNIT = {FORWARD: 2.0**-4, GRADIENT: 2.0**-3}  # of a normal number, relative to it


def test_the_largest_value_is_kept_and_others_are_rounded_to_three_bits():
    x = torch.tensor([448.0, -17.0, 17.0, 19.0, 0.3, 2.0**-10, 2.0**-11, 0.0]) / 8
    wanted = torch.tensor([448.0, -16.0, 16.0, 20.0, 0.3125, 0.0, 0.0, 0.0]) / 8
    assert torch.equal(rounded(x, FORWARD), wanted)


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_errors_are_half_a_unit_whatever_the_size_of_the_tensor(dtype, size):
    x = normal(1000) * size
    limit = torch.finfo(dtype)
    smallest_normal = x.abs().max() * (limit.smallest_normal / limit.max)
    error = (rounded(x, dtype) - x).abs()
    assert (error <= HALF_UNIT[dtype] * x.abs().clamp_min(smallest_normal) * (1 + 1e-5)).all()
    assert error.max() > 0.5 * HALF_UNIT[dtype] * x.abs().max() / 2


def test_zeros_stay_zeros_and_nothing_hides_nan_or_inf():
    weight = normal(3, 16)
    assert not float8_linear(torch.zeros(2, 16), weight).any()
    for bad in (float("nan"), float("inf")):
        x = normal(2, 16)
        x[0, 3] = bad
        assert float8_linear(x, weight)[0].isnan().all()


@pytest.mark.parametrize("leading", [(1,), (7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_is_the_definition(leading, dtype):
    inputs = {"x": normal(*leading, 32, dtype=dtype), "weight": normal(9, 32, seed=1)}
    got = run("torch", float8_linear, inputs)
    want = run("reference", float8_linear, inputs)
    assert_close(got, want, TOLERANCE)
    assert got["out0"].dtype == got["dx"].dtype == dtype
    assert got["dweight"].dtype == torch.float32


def test_results_are_those_of_exact_products_within_the_rounding_of_their_factors():
    """Errors of factors are independent, so those of sums grow as sums of random numbers do: 2^-4 / sqrt(3) at most,
    of the root of the mean square, for each factor in e4m3, and twice that in e5m2."""
    inputs = {"x": normal(64, 256), "weight": normal(128, 256, seed=1)}
    got, want = run("torch", float8_linear, inputs), run("torch", linear, inputs, torch.float64)
    share = 2.0**-4 / 3**0.5
    for name, bound in {"out0": 2**0.5 * share, "dx": 5**0.5 * share, "dweight": 5**0.5 * share}.items():
        error = (got[name].double() - want[name]).square().mean().sqrt() / want[name].square().mean().sqrt()
        assert bound / 4 < error < bound, name


def test_a_row_of_outliers_costs_the_others_bits_but_not_their_meaning():
    x = normal(64, 32)
    x[0] *= 100
    error = (float8_linear(x, torch.eye(32)) - x)[1:].abs()
    assert error.max() < 2.0**-4 * x[1:].abs().max()


def test_under_autocast_it_gives_bfloat16_and_gradients_of_float32_weights_are_float32():
    x, weight = normal(4, 16).requires_grad_(), normal(3, 16, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = float8_linear(x, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    wanted = rounded(x.detach().bfloat16(), FORWARD).sum(0).expand(3, -1)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "weight"), [((3, 8), (4, 9)), ((0, 8), (4, 8)), ((3, 8), (8,))])
def test_shapes_that_do_not_go_together_are_named(x, weight):
    with pytest.raises(ValueError, match=r"float8_linear: found x \(.*expected x \(\.\.\., i\)"):
        float8_linear(torch.zeros(x), torch.zeros(weight))


def test_quantized_values_are_whole_tensors_with_one_scale():
    values, inverse = quantize(normal(5, 16), FORWARD)
    assert values.dtype == FORWARD
    assert inverse.shape == ()
    assert values.float().abs().max() == torch.finfo(FORWARD).max


def test_off_the_gpu_it_runs_in_plain_torch():
    x, weight = normal(2, 16, dtype=torch.bfloat16), normal(3, 16)
    assert float8_linear.choose(x, weight).path == "torch"
    with use("triton"):
        assert float8_linear.choose(x, weight).path == "triton"
        odd = normal(2, 17, dtype=torch.bfloat16)
        assert "no multiple of 16" in float8_linear.choose(odd, normal(3, 17)).reason
        assert "float32" in float8_linear.choose(x.float(), weight).reason
