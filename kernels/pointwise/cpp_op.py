"""The operators' C++ path: tensors as the kernels want them, and autograd.

Without a gradient to compute, autograd is left out: decoding calls these hundreds of times a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpp import library
from kernels.cpp.constants import MAX_DIMS
from kernels.cpp.library import rows_contiguous
from kernels.pointwise.plain import heads_first

Table = tuple[Tensor, Tensor]  # cosines and sines


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.pointwise; weight is in the dtype of x."""
    if not _needs_grad(x, weight):
        return _rms_norm(x, weight, eps, None)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.new_empty(x.shape[:-1].numel())
        ctx.save_for_backward(x, weight, inverse)
        return _rms_norm(x, weight, eps, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = _contiguous(x), torch.empty_like(weight, memory_format=torch.contiguous_format)
        operands = (_rows(x), weight.contiguous(), inverse, _rows(grad), None)
        library.call("rms_norm_backward", x.dtype, *operands, grad_x, grad_weight)
        return grad_x, grad_weight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None) -> Tensor:
    _require(weight.shape == x.shape[-1:], x, weight)
    out = _contiguous(x)
    library.call("rms_norm", x.dtype, _rows(x), None, weight.contiguous(), None, out, inverse, float(eps))
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kernels.pointwise; all are of one dtype."""
    if not _needs_grad(x, delta, weight):
        return _add_rms_norm(x, delta, weight, eps, None)
    both: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, delta, weight, eps)
    return both


class _AddRMSNorm(torch.autograd.Function):
    """The gradients of the sum and of its norm are added on the way back, without a tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = x.new_empty(x.shape[:-1].numel())
        total, normed = _add_rms_norm(x, delta, weight, eps, inverse)
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        if grad_normed is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = _contiguous(total), torch.empty_like(weight, memory_format=torch.contiguous_format)
        base = None if grad_total is None else _rows(grad_total)
        operands = (_rows(total), weight.contiguous(), inverse, _rows(grad_normed), base)
        library.call("rms_norm_backward", total.dtype, *operands, grad, grad_weight)
        return grad, grad, grad_weight, None


def _add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, inverse: Tensor | None
) -> tuple[Tensor, Tensor]:
    _require(weight.shape == x.shape[-1:] and delta.shape == x.shape, x, delta, weight)
    total, normed = _contiguous(x), _contiguous(x)
    operands = (_rows(x), _rows(delta), weight.contiguous(), total, normed, inverse)
    library.call("rms_norm", x.dtype, *operands, float(eps))
    return total, normed


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.pointwise; all are of one dtype."""
    if not _needs_grad(x, gate, weight):
        return _gated_rms_norm(x, gate, weight, eps, None)
    normed: Tensor = _GatedRMSNorm.apply(x, gate, weight, eps)
    return normed


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps its inputs and one number a row: the product is cheaper to compute again than to read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.new_empty(x.shape[:-1].numel())
        ctx.save_for_backward(x, gate, weight, inverse)
        return _gated_rms_norm(x, gate, weight, eps, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverse = ctx.saved_tensors
        grads = (_contiguous(x), _contiguous(x), torch.empty_like(weight, memory_format=torch.contiguous_format))
        operands = (_rows(x), _rows(gate), weight.contiguous(), inverse, _rows(grad))
        library.call("gated_rms_norm_backward", x.dtype, *operands, *grads)
        return *grads, None


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, inverse: Tensor | None) -> Tensor:
    _require(gate.shape == x.shape and weight.shape == x.shape[-1:], x, gate, weight)
    out = _contiguous(x)
    library.call("gated_rms_norm", x.dtype, _rows(x), _rows(gate), weight.contiguous(), out, inverse, float(eps))
    return out


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """See kernels.pointwise; x and gate are of one dtype."""
    if not _needs_grad(x, gate):
        return _gated(x, gate)
    product: Tensor = _Gated.apply(x, gate)
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _gated(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        grad_x, grad_gate = _contiguous(x), _contiguous(x)
        library.call("gated_backward", x.dtype, _rows(x), _rows(gate), _rows(grad), grad_x, grad_gate)
        return grad_x, grad_gate


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    _require(gate.shape == x.shape, x, gate)
    out = _contiguous(x)
    library.call("gated", x.dtype, _rows(x), _rows(gate), out)
    return out


def gated_product(gate_up: Tensor) -> Tensor:
    """See kernels.pointwise."""
    if not _needs_grad(gate_up):
        return _gated_product(gate_up)
    product: Tensor = _GatedProduct.apply(gate_up)
    return product


class _GatedProduct(torch.autograd.Function):
    """The gradients land side by side too, without a copy."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated_product(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = _contiguous(gate_up)
        library.call("gated_product_backward", gate_up.dtype, _rows(gate_up), _rows(grad), grad_gate_up)
        return grad_gate_up


def _gated_product(gate_up: Tensor) -> Tensor:
    *leading, width = gate_up.shape
    _require(width % 2 == 0, gate_up)
    out = gate_up.new_empty(*leading, width // 2)
    library.call("gated_product", gate_up.dtype, _rows(gate_up), out)
    return out


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel takes these: one dtype, tables that broadcast to x, at most 5 dimensions."""
    if not (x.dtype == cos.dtype == sin.dtype and cos.shape == sin.shape and 3 <= x.dim() <= MAX_DIMS):
        return False
    leading, table = x.shape[:-2], cos.shape[:-1]
    return (
        x.shape[-1] == 2 * cos.shape[-1]
        and len(table) <= len(leading)
        and all(n in (1, m) for n, m in zip(reversed(table), reversed(leading), strict=False))
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See kernels.pointwise; only what `rotates` admits."""
    if not _needs_grad(x):
        return _rotated(x, cos, sin, inverse, heads_first(x))
    rotated: Tensor = _Rotate.apply(x, cos, sin, inverse)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _rotated(x, cos, sin, inverse, heads_first(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, not ctx.inverse, _contiguous(grad)), None, None, None  # as projections have it


def rotate_both(x: Tensor, first: Table, second: Table) -> tuple[Tensor, Tensor]:
    """See kernels.pointwise; only what `rotates` admits."""
    if not _needs_grad(x):
        return _rotated(x, *first, False, heads_first(x)), _rotated(x, *second, False, heads_first(x))
    both: tuple[Tensor, Tensor] = _RotateBoth.apply(x, *first, *second)
    return both


class _RotateBoth(torch.autograd.Function):
    """The two gradients are added on the way back, without a tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        cos, sin, other_cos, other_sin = tables
        return _rotated(x, cos, sin, False, heads_first(x)), _rotated(x, other_cos, other_sin, False, heads_first(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        saved = ctx.saved_tensors  # asked for once: under activation checkpointing that computes them
        for grad, cos, sin in zip(grads, saved[::2], saved[1::2], strict=True):
            if grad is not None:
                total = _rotated(grad, cos, sin, True, _contiguous(grad) if total is None else total, base=total)
        return total, None, None, None, None


def rotate_keys(keys_values: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.pointwise; only what `rotates` admits."""
    if not _needs_grad(keys_values):
        k, v = keys_values.chunk(2, -2)
        return _rotated(k, cos, sin, False, heads_first(k)), k, v
    parts: tuple[Tensor, Tensor, Tensor] = _RotateKeys.apply(keys_values, cos, sin)
    return parts


class _RotateKeys(torch.autograd.Function):
    """The gradients land side by side, as the projection has them."""

    @staticmethod
    def forward(ctx: Any, keys_values: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = keys_values.shape, keys_values.dtype
        k, v = keys_values.chunk(2, -2)
        return _rotated(k, cos, sin, False, heads_first(k)), k, v

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rotated: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad = torch.empty(ctx.shape, dtype=ctx.dtype)
        into_k, into_v = grad.chunk(2, -2)
        if grad_rotated is None:
            _fill(into_k, grad_k)
        else:
            cos, sin = ctx.saved_tensors
            _rotated(grad_rotated, cos, sin, True, into_k, base=grad_k)
        _fill(into_v, grad_v)
        return grad, None, None


def _fill(into: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        into.zero_()
    else:
        into.copy_(grad)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor, base: Tensor | None = None) -> Tensor:
    """Into `out`, and on top of `base`."""
    base = None if base is None else rows_contiguous(base)
    operands = (rows_contiguous(x), rows_contiguous(cos), rows_contiguous(sin), base, out)
    library.call("rotate", x.dtype, *operands, x.dim(), cos.dim(), int(inverse))
    return out


def branch(x_btd: Tensor, num_rows: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.pointwise; x needs a gradient."""
    branches: tuple[Tensor, Tensor, Tensor] = _Branch.apply(x_btd, num_rows)
    return branches


class _Branch(torch.autograd.Function):
    """The branches' gradients are added in one pass, without filling up what is shorter."""

    @staticmethod
    def forward(ctx: Any, x_btd: Tensor, num_rows: tuple[int, int, int]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype = x_btd.shape, x_btd.dtype
        ctx.set_materialize_grads(False)
        return tuple(x_btd[:, :count] for count in num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        total = torch.empty(ctx.shape, dtype=ctx.dtype)
        operands = [None if grad is None else rows_contiguous(grad) for grad in grads]
        library.call("add_rows", ctx.dtype, *operands, total)
        return total, None


def split(x: Tensor, widths: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.pointwise; x needs a gradient."""
    parts: tuple[Tensor, Tensor, Tensor] = _Split.apply(x, widths)
    return parts


class _Split(torch.autograd.Function):
    """torch joins the parts' gradients on one thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, int, int]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype, ctx.widths = x.shape, x.dtype, widths
        ctx.set_materialize_grads(False)
        return x.split(widths, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        joined, (first, second, _) = torch.empty(ctx.shape, dtype=ctx.dtype), ctx.widths
        operands = [None if grad is None else _rows(grad) for grad in grads]
        library.call("join_columns", ctx.dtype, *operands, _rows(joined), first, first + second)
        return joined, None


def cross_entropy_(
    logits_sv: Tensor, target_s: Tensor, z_loss_weight: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """See kernels.pointwise."""
    if logits_sv.stride(-1) != 1:
        raise ValueError(f"cross_entropy_ works in place on contiguous rows; these have strides {logits_sv.stride()}.")
    _require(target_s.shape == logits_sv.shape[:1], logits_sv, target_s)
    if target_s.numel():
        lowest, highest = target_s.aminmax()
        if lowest < 0 or highest >= logits_sv.shape[1]:
            raise IndexError(f"targets {int(lowest)} .. {int(highest)} for {logits_sv.shape[1]} classes.")
    nll_s, log_z_s = logits_sv.new_empty(2, logits_sv.shape[0])
    scalars = (float(z_loss_weight), int(with_gradient))
    library.call("cross_entropy", logits_sv.dtype, logits_sv, target_s, nll_s, log_z_s, *scalars)
    return nll_s, log_z_s


def _needs_grad(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _require(fits: bool, *inputs: Tensor) -> None:
    """Kernels read where they are told to: shapes are checked before."""
    if not fits:
        raise ValueError(f"these shapes do not go together: {', '.join(str(tuple(x.shape)) for x in inputs)}.")


def _contiguous(x: Tensor) -> Tensor:
    """Fresh memory for a tensor of x's shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width], rows contiguous: a view where it can be one."""
    return rows_contiguous(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
