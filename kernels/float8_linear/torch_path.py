"""Projections in float8 in plain torch: the same numbers where no device multiplies float8, at no gain in speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.float8_linear.reference import FORWARD, GRADIENT, SMALLEST, Float8Inputs
from kernels.operator import Kept, Path, Saved, differentiable

# Sums in another order; in 16 bits results are rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Quantized(NamedTuple):
    """A tensor in float8, and what its values are multiplied by."""

    values: Tensor
    inverse: Tensor

    def dequantized(self) -> Tensor:
        return self.values.float() * self.inverse


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Scale a tensor to the range of a format, and round it."""
    x, limit = x.float(), torch.finfo(dtype).max
    largest = x.abs().amax().clamp_min(SMALLEST)
    most = torch.full_like(largest, limit)  # a quotient with a number is a product with an inverse, rounded twice
    return Quantized((x * (most / largest)).clamp(-limit, limit).to(dtype), largest / most)


def _forward(x: Tensor, weight_oi: Tensor, *, save: bool) -> Kept[Tensor]:
    quantized_x, quantized_w = quantize(x, FORWARD), quantize(weight_oi.to(x.dtype), FORWARD)
    y = (quantized_x.dequantized() @ quantized_w.dequantized().t()).to(x.dtype)
    return y, (*quantized_x, *quantized_w), (x.dtype, weight_oi.dtype)


def _backward(saved: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
    (x, inverse_x, weight, inverse_weight), (dtype, weight_dtype) = saved
    grad = quantize(grad, GRADIENT).dequantized()
    grad_x = grad @ Quantized(weight, inverse_weight).dequantized()
    rows = Quantized(x, inverse_x).dequantized().flatten(0, -2)
    return grad_x.to(dtype), (grad.flatten(0, -2).t() @ rows).to(weight_dtype)


_products = differentiable(_forward, _backward)


def _run(inputs: Float8Inputs) -> Tensor:
    y: Tensor = _products(*inputs)
    return y


float8_linear = Path(_run, tolerance=TOLERANCE)
