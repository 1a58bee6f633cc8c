"""What the static paths of the operators are made of: views, shifts and masks, with gradients as plain as they are.

A static path has fixed shapes, one graph, and only what a compiler for matrix hardware lowers well.
docs/design/0071-static-path.md says which constructs it avoids, and what stands in for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = -1e30  # a score that softmax makes 0: finite, so that a row of nothing else is no NaN


def parts(x: Tensor, widths: Sequence[int], dim: int = -1) -> tuple[Tensor, ...]:
    """x cut into slices along a dimension. Their gradients are laid side by side: no sum of padded ones."""
    found: tuple[Tensor, ...] = _Parts.apply(x, tuple(widths), dim)
    return found


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        found, first = [], 0
        for width in widths:
            found.append(x.narrow(dim, first, width))
            first += width
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(grads, ctx.dim), None, None


def unbound(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """x at each index of a dimension. Their gradients are stacked."""
    found: tuple[Tensor, ...] = _Unbound.apply(x, dim)
    return found


class _Unbound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(x.select(dim, i) for i in range(x.shape[dim]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack(grads, ctx.dim), None


def padded(x: Tensor, front: int, back: int) -> Tensor:
    """x [b, t, ...] with zeros before and behind along t; negative numbers cut off."""
    if not front and not back:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 2) + (front, back))


def shifted(x: Tensor, lag: int) -> Tensor:
    """x [b, t, ...] of `lag` positions earlier, zeros at the beginning."""
    return padded(x, lag, -lag) if lag < x.shape[1] else torch.zeros_like(x)


def same_document(doc_ids_bt: Tensor, lag: int, dtype: torch.dtype) -> Tensor:
    """1 where the position `lag` earlier is of the same document, else 0; [b, t, 1]. Of no meaning before the first."""
    return (doc_ids_bt == shifted(doc_ids_bt, lag)).to(dtype)[..., None]


def lower_triangle(size: int, like: Tensor, diagonal: int = 0) -> Tensor:
    """Ones on and below a diagonal, [size, size]."""
    return like.new_ones(size, size).tril(diagonal)


def identity(size: int, like: Tensor) -> Tensor:
    """Ones on the diagonal, [size, size]."""
    row = torch.arange(size, device=like.device)
    return (row[:, None] == row).to(like.dtype)


def intervals(x: Tensor) -> Tensor:
    """[..., l] to [..., t, s]: the sum of x over (s, t], each by itself; 0 where s >= t.

    By a product with a triangle of ones: a sum of x <= 0 has no term of another sign, so none is rounded away.
    """
    lower = lower_triangle(x.shape[-1], x)
    return torch.matmul(x[..., None, :] * lower, lower.tril(-1))


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[...] to [..., size]: 1 at the index, zeros for a negative one. A product with it is a gather."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(dtype)
