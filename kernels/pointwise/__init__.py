"""Small operators of every block, element by element or row by row: bound by memory, so each is one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.pointwise import cpp_op, plain
from kernels.pointwise.cpp_op import Table

__all__ = [
    "add_rms_norm",
    "branch",
    "cross_entropy_",
    "gated",
    "gated_product",
    "gated_rms_norm",
    "rms_norm",
    "rotate",
    "rotate_both",
    "rotate_keys",
    "split",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args: x: [..., d].  weight: [d], taken in the dtype of x.
    """
    weight = weight.to(x.dtype)
    if dispatch.chosen(x) == "cpp":
        return cpp_op.rms_norm(x, weight, eps)
    return plain.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its rms_norm: a step along the residual stream. x and delta: [..., d]."""
    if dispatch.chosen(x) == "cpp" and delta.dtype == x.dtype:
        return cpp_op.add_rms_norm(x, delta, weight.to(x.dtype), eps)
    total = x + delta
    return total, plain.rms_norm(total, weight.to(total.dtype), eps)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * SiLU(gate), both of one shape, in the dtype of the gate."""
    if dispatch.chosen(x) == "cpp" and gate.dtype == x.dtype:
        return cpp_op.gated(x, gate)
    return plain.gated(x, gate)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x * SiLU(gate)) * weight over the last dimension.

    Args: x, gate: [..., d].  weight: [d], taken in the dtype of the product.
    """
    if dispatch.chosen(x) == "cpp" and gate.dtype == x.dtype:
        return cpp_op.gated_rms_norm(x, gate, weight.to(x.dtype), eps)
    product = plain.gated(x, gate)
    return plain.rms_norm(product, weight.to(product.dtype), eps)


def gated_product(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up for gate and up side by side in the last dimension: [..., 2 d] -> [..., d]."""
    if dispatch.chosen(gate_up) == "cpp":
        return cpp_op.gated_product(gate_up)
    return plain.gated_product(gate_up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (i, i + p/2) of x by the angles whose cosines and sines are given, or back.

    Args: x: [..., h, p].  cos, sin: [..., p / 2], without gradient; their leading dimensions broadcast with those of x.
    Returns: shape and dtype of x; in memory, heads come ahead of the dimension before them, as attention reads them.
    """
    if dispatch.chosen(x) == "cpp" and cpp_op.rotates(x, cos, sin):
        return cpp_op.rotate(x, cos, sin, inverse)
    return plain.rotate(x, cos, sin, inverse)


def rotate_both(x: Tensor, first: Table, second: Table) -> tuple[Tensor, Tensor]:
    """x rotated by one table of cosines and sines, and x rotated by another: see `rotate`."""
    if dispatch.chosen(x) == "cpp" and cpp_op.rotates(x, *first) and cpp_op.rotates(x, *second):
        return cpp_op.rotate_both(x, first, second)
    return plain.rotate(x, *first, False), plain.rotate(x, *second, False)


def rotate_keys(keys_values: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys rotated, keys as they are, and values.

    Args: keys_values: [..., 2 h, p], keys before values.  cos, sin: see `rotate`.
    Returns: [..., h, p] each; the last two are views.
    """
    k, v = keys_values.chunk(2, -2)
    if dispatch.chosen(keys_values) == "cpp" and cpp_op.rotates(k, cos, sin):
        return cpp_op.rotate_keys(keys_values, cos, sin)
    return plain.rotate(k, cos, sin, False), k, v


def branch(x_btd: Tensor, num_rows: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of x's first rows (along t), each to go a way of its own; their gradients meet in one pass."""
    if x_btd.requires_grad and torch.is_grad_enabled() and dispatch.chosen(x_btd) == "cpp":
        return cpp_op.branch(x_btd, num_rows)
    first, second, third = (x_btd if count == x_btd.shape[1] else x_btd[:, :count] for count in num_rows)
    return first, second, third


def split(x: Tensor, widths: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x cut into three along its last dimension, as views."""
    if x.requires_grad and torch.is_grad_enabled() and dispatch.chosen(x) == "cpp":
        return cpp_op.split(x, widths)
    first, second, third = x.split(widths, -1)
    return first, second, third


def cross_entropy_(
    logits_sv: Tensor, target_s: Tensor, z_loss_weight: float = 0.0, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Replace each row of logits by softmax - onehot(target) / slope with slope = 1 + 2 z_loss_weight log_z: times its
    slope, it is the gradient of nll + z_loss_weight log_z^2. No gradient passes.

    Args:
        target_s: a class for each row, in 0 .. v - 1.
        with_gradient: where False the logits are lost all the same, but what replaces them has no meaning.
    Returns: nll = -log softmax[target] and log_z = logsumexp of each row.
    Raises: IndexError, or RuntimeError: a target is no class.
    """
    if dispatch.chosen(logits_sv) == "cpp":
        return cpp_op.cross_entropy_(logits_sv, target_s, z_loss_weight, with_gradient)
    return plain.cross_entropy_(logits_sv, target_s, z_loss_weight, with_gradient)
