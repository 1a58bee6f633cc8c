"""Small operators of every block, element by element or row by row: bound by memory, so each is one pass over it."""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.pointwise import cpp_op, plain
from kernels.pointwise.cpp_op import Table

__all__ = [
    "gated",
    "gated_product",
    "gated_rms_norm",
    "rms_norm",
    "rotate",
    "rotate_both",
    "rotate_keys",
    "softmax_nll_",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args: x: [..., d].  weight: [d], taken in the dtype of x.
    """
    weight = weight.to(x.dtype)
    if dispatch.chosen(x) == "cpp":
        return cpp_op.rms_norm(x, weight, eps)
    return plain.rms_norm(x, weight, eps)


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


def softmax_nll_(logits_sv: Tensor, target_s: Tensor, with_softmax: bool = True) -> tuple[Tensor, Tensor]:
    """Replace the logits by their softmax, row by row. No gradient passes.

    Args:
        target_s: a class for each row, in 0 .. v - 1.
        with_softmax: where False the logits are lost all the same, but what replaces them has no meaning.
    Returns: -log softmax[target] and logsumexp of each row.
    Raises: IndexError, or RuntimeError: a target is no class.
    """
    if dispatch.chosen(logits_sv) == "cpp":
        return cpp_op.softmax_nll_(logits_sv, target_s, with_softmax)
    return plain.softmax_nll_(logits_sv, target_s, with_softmax)
