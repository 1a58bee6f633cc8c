"""Whether float8 products are right on a device: asked once, before training."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.float8_linear import float8_linear
from kernels.float8_linear.reference import FORWARD, GRADIENT
from kernels.float8_linear.torch_path import quantize
from kernels.operator import use

SHAPE = (520, 1808, 656)  # rows, inputs, outputs: more than a tile of each, and no multiple of one
ALLOWED = 1e-2  # of the largest value: one rounding to bfloat16, and sums in fewer bits


def wrong_on(device: torch.device) -> str | None:
    """What is wrong there; None if casts have torch's bits, and results are those of the same rounding in torch.

    Compilers write wrong transposes now and then, and training would not say more than NaN.
    """
    from kernels.float8_linear import triton_path

    num_rows, num_in, num_out = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((num_rows, num_in), (num_out, num_in), (num_rows, num_out))
    )
    for kind in (FORWARD, GRADIENT):
        made, want = triton_path.cast(x, kind, transposed=True), quantize(x, kind).values
        assert made.columns is not None
        if not torch.equal(made.rows[:num_rows, :num_in].view(torch.uint8), want.view(torch.uint8)):
            return f"casts to {kind} are not those of torch"
        if not torch.equal(made.columns.view(torch.uint8), made.rows.view(torch.uint8).t()):
            return f"transposes in {kind} are not those of the casts"
    names = ("outputs", "gradients of inputs", "gradients of weights")
    with use("torch"):
        wanted = _results(x, weight, grad)
    for name, got, exact in zip(names, _results(x, weight, grad), wanted, strict=True):
        if not float((got.float() - exact.float()).abs().max()) <= ALLOWED * float(exact.abs().max()):
            return f"{name} are not those of torch"
    return None


def _results(x: Tensor, weight_oi: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight_oi = (factor.detach().requires_grad_() for factor in (x, weight_oi))
    with torch.enable_grad():
        y = float8_linear(x, weight_oi)
    return (y.detach(), *torch.autograd.grad(y, (x, weight_oi), grad))
