"""liger-kernel as the Triton path of some operators: when it is chosen, and that it computes the same.

Its kernels run in Triton's interpreter here, in float32: that multiplies bfloat16 numbers as if their bits were
integers. Only the loss's kernel widens them first. None ran on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.triton_path import TOLERANCE
from kernels.gpu import liger
from kernels.operator import Operator, use
from kernels.pointwise import add_rms_norm, gated_product, gated_rms_norm, rms_norm
from tests.kernels.helpers import assert_close, normal, run

is_on_gpu = liger._is_on_gpu


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(liger, "_is_on_gpu", lambda x: True)


@pytest.fixture
def interpretable_rms_norm(monkeypatch):
    """What the interpreter lacks for liger's RMSNorm: scalars with `.to`, and CUDA's own rsqrt."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(arg: object) -> object:
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return convert(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: 1 / tl.sqrt(x))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(liger, "_is_installed", lambda: True)


def compare(operator: Operator[..., Any, Any], *inputs: Tensor, **options: float) -> None:
    named = {str(i): x for i, x in enumerate(inputs)}
    got, want = (run(path, lambda *x: operator(*x, **options), named) for path in ("triton", "torch"))
    assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in want.items()}
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 5, 24), (2, 3, 2, 16)])
def test_rms_norm_by_liger_is_the_plain_one(shape, interpretable_rms_norm):
    x, other, weight = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    compare(rms_norm, x, weight, eps=1e-5)
    compare(gated_rms_norm, x, other, weight, eps=1e-5)
    compare(add_rms_norm, x, other, weight, eps=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 80), (2, 5, 80), (7, 80)])
def test_gated_product_by_liger_is_the_plain_one(shape):
    compare(gated_product, normal(*shape))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_loss_by_liger_is_the_plain_one(ignored, z_loss_weight, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (37, 50))
    target = torch.randint(50, (37,), generator=generator)
    if ignored != "none":
        target[:: 3 if ignored == "some" else 1] = -100
    results = []
    for path in ("torch", "triton"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with use(path):
            out = linear_cross_entropy(leaves[0], leaves[1], target, z_loss_weight)
        results.append([*out, *torch.autograd.grad(3 * out.loss, leaves)])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1e-2, want.abs().max().item())


def test_loss_by_liger_without_gradients():
    hidden, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([0, 3, -100, 10, 2])
    with use("triton"):
        got = linear_cross_entropy(hidden, weight, target, 0.0)
    want = nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="none")
    torch.testing.assert_close(got.nll_s, want)
    torch.testing.assert_close(got.loss, want.sum() / 4)


def path_of(x: Tensor) -> str:
    return rms_norm.choose(x, torch.ones(4), 1e-5).path


def path_of_loss(x: Tensor) -> str:
    return linear_cross_entropy.choose(x, torch.ones(3, 4), torch.zeros(1, dtype=torch.long), 0.0).path


def test_liger_runs_if_the_triton_path_is_chosen(installed):
    x = torch.zeros(1, 4)
    assert path_of(x) != "triton"  # a CPU tensor
    with use("triton"):
        assert [path_of(x.to(dtype)) for dtype in liger.DTYPES] == ["triton"] * 3
        assert path_of(x.double()) == "torch"
        assert path_of_loss(x) == "triton"
        assert path_of_loss(x.half()) == "torch"
    with use("reference"):
        assert path_of(x) == "reference"


def test_liger_is_for_tensors_on_a_gpu(installed, monkeypatch):
    monkeypatch.setattr(liger, "_is_on_gpu", is_on_gpu)
    with use("triton"):
        assert path_of(torch.zeros(1, 4)) == "torch"


def test_liger_stays_out_of_compiled_graphs(installed):
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        seen.append(path_of(x))
        return x + 1

    with use("triton"):
        compiled(torch.zeros(2, 4))
    assert seen == ["torch"]


def test_a_missing_liger_is_logged_once_and_the_plain_path_runs(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else object())
    liger._is_installed.cache_clear()
    x, weight = torch.randn(3, 4), torch.ones(4)
    with caplog.at_level(logging.WARNING), use("triton"):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), nn.functional.rms_norm(x, (4,), eps=1e-5))
        rms_norm(x, weight, 1e-5)
    liger._is_installed.cache_clear()
    assert [record.message for record in caplog.records if "pip install -e '.[gpu]'" in record.message]
    assert len(caplog.records) == 1
