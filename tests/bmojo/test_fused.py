"""liger-kernel behind the model's layers: when it is chosen, and that it computes the same.

Its kernels run in Triton's interpreter here, in float32: that multiplies bfloat16 numbers as if their bits were
integers. Only the loss's kernel widens them first. None ran on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import Tensor, nn

from bmojo import fused
from bmojo.layers import RMSNorm, SwiGLU
from bmojo.loss import linear_cross_entropy
from kernels import dispatch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bfloat16: two roundings of 2^-8, on either side


is_on_gpu = fused._is_on_gpu


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fused, "_is_on_gpu", lambda x: True)


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
    monkeypatch.setattr(fused, "_is_installed", lambda: True)


def compare(module: nn.Module, x: Tensor) -> None:
    """Outputs and all gradients of both paths, relative to the largest value."""
    results = []
    for path in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        with dispatch.use(path):
            out = module(leaf)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], cotangent)])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= TOLERANCE[x.dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 5, 24), (2, 3, 2, 16)])
def test_rms_norm_by_liger_is_the_plain_one(shape, interpretable_rms_norm):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5)
    nn.init.normal_(norm.weight)
    compare(norm, torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 5, 24), (7, 24)])
def test_swiglu_by_liger_is_the_plain_one(shape):
    torch.manual_seed(0)
    compare(SwiGLU(24, 40), torch.randn(shape))


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
        with dispatch.use(path):
            out = linear_cross_entropy(leaves[0], leaves[1], target, z_loss_weight)
        results.append([*out, *torch.autograd.grad(3 * out.loss, leaves)])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1e-2, want.abs().max().item())


def test_loss_by_liger_without_gradients():
    hidden, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([0, 3, -100, 10, 2])
    with dispatch.use("triton"):
        got = linear_cross_entropy(hidden, weight, target, 0.0)
    want = nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="none")
    torch.testing.assert_close(got.nll_s, want)
    torch.testing.assert_close(got.loss, want.sum() / 4)


def test_liger_serves_where_the_triton_path_is_chosen(installed):
    x = torch.zeros(1)
    assert not fused.serves(x)  # a CPU tensor
    with dispatch.use("triton"):
        assert fused.serves(x)
        assert fused.serves(x.bfloat16())
        assert not fused.serves(x.double())
        assert fused.serves(x.half())
        assert not fused.serves_loss(x.half())
    with dispatch.use("reference"):
        assert not fused.serves(x)


def test_liger_is_for_tensors_on_a_gpu(installed, monkeypatch):
    monkeypatch.setattr(fused, "_is_on_gpu", is_on_gpu)
    with dispatch.use("triton"):
        assert not fused.serves(torch.zeros(1))


def test_liger_stays_out_of_compiled_graphs(installed):
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        seen.append(fused.serves(x))
        return x + 1

    with dispatch.use("triton"):
        compiled(torch.zeros(2))
    assert seen == [False]


def test_a_missing_liger_is_logged_once_and_the_plain_path_runs(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else object())
    fused._is_installed.cache_clear()
    norm, x = RMSNorm(4, 1e-5), torch.randn(3, 4)
    with caplog.at_level(logging.WARNING), dispatch.use("triton"):
        torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (4,), eps=1e-5))
        norm(x)
    fused._is_installed.cache_clear()
    assert [record.message for record in caplog.records if "pip install -e '.[gpu]'" in record.message]
    assert len(caplog.records) == 1
