"""Casts to float8 in Triton, to the bit, and the products made of them; in the interpreter or on a GPU.

The interpreter rounds to float8 wrongly: a carry out of the mantissa is lost (1.97 becomes 1), and NaN a number. In
these tests torch rounds in its place; on a GPU the chip does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernels.float8_linear import float8_linear, self_check, triton_path
from kernels.float8_linear.reference import FORWARD, GRADIENT
from kernels.float8_linear.torch_path import quantize
from kernels.operator import use
from tests.kernels.helpers import assert_close, normal, pairwise, run

pytestmark = pytest.mark.usefixtures("nan_memory")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # sums in another order, one rounding
FORMATS = {"fp8e4nv": FORWARD, "fp8e5": GRADIENT}


@pytest.fixture(autouse=True)
def torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = interpreter._convert_float

    def rounded(values: Any, dtype: Any, to: Any, mode: Any) -> Any:
        if str(dtype) != "fp32" or str(to) not in FORMATS:
            return convert(values, dtype, to, mode)
        kept = torch.from_numpy(np.array(values, np.float32)).to(FORMATS[str(to)])
        return kept.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.cpu().view(torch.uint8), want.cpu().view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    pairwise(
        [(1, 16), (40, 48), (17, 35), (33, 130), (200, 16)],
        list(triton_path.DTYPES),
        [FORWARD, GRADIENT],
    ),
)
def test_a_cast_and_its_transpose_have_the_bits_of_torch_and_are_filled_with_zeros(shape, dtype, kind):
    x = normal(*shape, dtype=dtype)
    made, want = triton_path.cast(x, kind, transposed=True), quantize(x, kind)
    rows, width = shape
    filled = (-(-rows // 16) * 16, -(-width // 16) * 16)
    assert made.rows.shape == filled
    assert made.columns.shape == filled[::-1]
    assert torch.equal(made.inverse, want.inverse)
    assert same_bits(made.rows[:rows, :width].contiguous(), want.values)
    assert same_bits(made.columns, made.rows.t().contiguous())
    assert not made.rows[rows:].float().any()
    assert not made.rows[:, width:].float().any()


def test_a_cast_of_wider_rows_reads_its_own_columns():
    x = normal(20, 64, dtype=torch.bfloat16)
    assert same_bits(
        triton_path.cast(x[:, 16:48], FORWARD, transposed=False).rows[:20], quantize(x[:, 16:48], FORWARD)[0]
    )


def test_the_scale_is_a_quotient_that_is_rounded_once():
    """57,344 / 3.0625 lies so that rounding twice moves values across the middle between two in float8."""
    x = normal(32, 35, dtype=torch.bfloat16, seed=90)
    assert x.abs().max() == 3.0625
    assert same_bits(
        triton_path.cast(x, GRADIENT, transposed=False).rows[:32, :35].contiguous(), quantize(x, GRADIENT)[0]
    )


def test_the_largest_value_is_found_wherever_it_is():
    for place in ((0, 0), (199, 99), (130, 64)):
        x = normal(200, 100, dtype=torch.bfloat16)
        x[place] = -50.0
        assert triton_path.cast(x, FORWARD, transposed=False).inverse.item() == pytest.approx(50 / 448)


def test_zeros_nan_and_inf():
    assert not triton_path.cast(torch.zeros(16, 16, dtype=torch.bfloat16), FORWARD, transposed=False).rows.float().any()
    for bad in (float("nan"), float("inf")):
        x, weight = normal(16, 16, dtype=torch.bfloat16), normal(16, 16, seed=1)
        x[3, 3] = bad
        with use("triton"):
            assert float8_linear(x, weight)[3].isnan().all()


@pytest.mark.parametrize(
    ("leading", "size", "dtype"),
    pairwise([(1,), (32,), (2, 9), (3, 2, 8)], [(16, 16), (48, 35), (144, 6)], list(triton_path.DTYPES)),
)
def test_outputs_and_gradients_are_those_of_plain_torch(leading, size, dtype):
    inputs = {"x": normal(*leading, size[0], dtype=dtype), "weight": normal(size[1], size[0], seed=1)}
    got, want = run("triton", float8_linear, inputs), run("torch", float8_linear, inputs)
    assert_close(got, want, TOLERANCE)


def test_without_a_gradient_nothing_is_transposed(monkeypatch):
    seen = []
    cast = triton_path.cast
    monkeypatch.setattr(
        triton_path, "cast", lambda *args, transposed: seen.append(transposed) or cast(*args, transposed=transposed)
    )
    with use("triton"), torch.no_grad():
        float8_linear(normal(4, 16, dtype=torch.bfloat16), normal(3, 16).requires_grad_())
    assert seen == [False, False]


def test_a_gradient_of_strided_rows_is_read_right():
    x = normal(32, 16, dtype=torch.bfloat16).requires_grad_()
    weight, wide = normal(8, 16, seed=1).requires_grad_(), normal(32, 24, dtype=torch.bfloat16, seed=2)
    with use("triton"):
        y = float8_linear(x, weight)
    strided = torch.autograd.grad(y, (x, weight), wide[:, 8:16], retain_graph=True)
    dense = torch.autograd.grad(y, (x, weight), wide[:, 8:16].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.fixture
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SHAPE", (40, 48, 32))


@pytest.mark.usefixtures("small_check")
def test_a_check_finds_nothing_wrong():
    with use("triton"):
        assert self_check.wrong_on(torch.zeros(()).device) is None


@pytest.mark.usefixtures("small_check")
@pytest.mark.parametrize(("field", "found"), [("rows", "casts to"), ("columns", "transposes in")])
def test_a_check_finds_a_wrong_byte(monkeypatch, field, found):
    """As Triton 3.6 wrote transposes of float32 on an H200."""
    cast = triton_path.cast

    def wrong(*args: Any, **options: Any) -> Any:
        made = cast(*args, **options)
        made._asdict()[field].view(torch.uint8)[5, 7] ^= 1
        return made

    monkeypatch.setattr(triton_path, "cast", wrong)
    with use("triton"):
        assert found in self_check.wrong_on(torch.zeros(()).device)


@pytest.mark.usefixtures("small_check")
def test_a_check_finds_a_gradient_of_nan(monkeypatch):
    product = triton_path.product
    monkeypatch.setattr(
        triton_path, "product", lambda a, b, dtype, fast: product(a, b, dtype, fast) * (1 if fast else float("nan"))
    )
    with use("triton"):
        assert self_check.wrong_on(torch.zeros(()).device) == "gradients of inputs are not those of torch"
