"""The small operators in C++: shapes, memory, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.constants import MAX_DIMS
from kernels.cpp.library import rows_contiguous
from kernels.operator import Kept, Path, Saved, differentiable
from kernels.pointwise.reference import (
    AddNormInputs,
    BranchInputs,
    GatedInputs,
    GatedNormInputs,
    GateUpInputs,
    KeysAndValues,
    NormInputs,
    RotateBothInputs,
    RotateInputs,
    RotateKeysInputs,
    RowInputs,
    RowLosses,
    SplitInputs,
    SumAndNorm,
    Three,
)
from kernels.pointwise.torch_path import heads_first
from kernels.shapes_only import is_shapes_only

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _norm(x: Tensor, weight: Tensor, eps: float, *, save: bool) -> Kept[Tensor]:
    _require(weight.shape == x.shape[-1:], x, weight)
    out, inverse = _contiguous(x), _inverses(x, save)
    library.call("rms_norm", x.dtype, _rows(x), None, weight.contiguous(), None, out, inverse, float(eps))
    return out, (x, weight, inverse), ()


def _norm_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse = saved.tensors
    grad_x, grad_weight = _contiguous(x), _contiguous(weight)
    operands = (_rows(x), weight.contiguous(), inverse, _rows(grad), None)
    library.call("rms_norm_backward", x.dtype, *operands, grad_x, grad_weight)
    return grad_x, grad_weight, None


def _add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, save: bool) -> Kept[tuple[Tensor, Tensor]]:
    _require(weight.shape == x.shape[-1:] and delta.shape == x.shape, x, delta, weight)
    total, normed, inverse = _contiguous(x), _contiguous(x), _inverses(x, save)
    operands = (_rows(x), _rows(delta), weight.contiguous(), total, normed, inverse)
    library.call("rms_norm", x.dtype, *operands, float(eps))
    return (total, normed), (total, weight, inverse), ()


def _add_norm_backward(
    saved: Saved, grad_total: Tensor | None, grad_normed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the sum and of its norm are added without a tensor for each."""
    total, weight, inverse = saved.tensors
    if grad_normed is None:
        return grad_total, grad_total, None, None
    grad, grad_weight = _contiguous(total), _contiguous(weight)
    base = None if grad_total is None else _rows(grad_total)
    operands = (_rows(total), weight.contiguous(), inverse, _rows(grad_normed), base)
    library.call("rms_norm_backward", total.dtype, *operands, grad, grad_weight)
    return grad, grad, grad_weight, None


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, save: bool) -> Kept[Tensor]:
    """Keep the inputs and one number per row: the product is cheaper to compute again than to read."""
    _require(gate.shape == x.shape and weight.shape == x.shape[-1:], x, gate, weight)
    out, inverse = _contiguous(x), _inverses(x, save)
    library.call("gated_rms_norm", x.dtype, _rows(x), _rows(gate), weight.contiguous(), out, inverse, float(eps))
    return out, (x, gate, weight, inverse), ()


def _gated_norm_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight, inverse = saved.tensors
    grads = (_contiguous(x), _contiguous(x), _contiguous(weight))
    operands = (_rows(x), _rows(gate), weight.contiguous(), inverse, _rows(grad))
    library.call("gated_rms_norm_backward", x.dtype, *operands, *grads)
    return *grads, None


def _gated(x: Tensor, gate: Tensor, *, save: bool) -> Kept[Tensor]:
    _require(gate.shape == x.shape, x, gate)
    out = _contiguous(x)
    library.call("gated", x.dtype, _rows(x), _rows(gate), out)
    return out, (x, gate), ()


def _gated_backward(saved: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, gate = saved.tensors
    grad_x, grad_gate = _contiguous(x), _contiguous(x)
    library.call("gated_backward", x.dtype, _rows(x), _rows(gate), _rows(grad), grad_x, grad_gate)
    return grad_x, grad_gate


def _gated_product(gate_up: Tensor, *, save: bool) -> Kept[Tensor]:
    *leading, width = gate_up.shape
    _require(width % 2 == 0, gate_up)
    out = gate_up.new_empty(*leading, width // 2)
    library.call("gated_product", gate_up.dtype, _rows(gate_up), out)
    return out, (gate_up,), ()


def _gated_product_backward(saved: Saved, grad: Tensor) -> Tensor:
    """The gradients land side by side too, without a copy."""
    (gate_up,) = saved.tensors
    grad_gate_up = _contiguous(gate_up)
    library.call("gated_product_backward", gate_up.dtype, _rows(gate_up), _rows(grad), grad_gate_up)
    return grad_gate_up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, *, save: bool) -> Kept[Tensor]:
    return _rotated(x, cos, sin, inverse, heads_first(x)), (cos, sin), (inverse,)


def _rotate_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cos, sin), (inverse,) = saved
    return _rotated(grad, cos, sin, not inverse, _contiguous(grad)), None, None, None  # as projections have it


def _rotate_both(x: Tensor, *tables: Tensor, save: bool) -> Kept[tuple[Tensor, Tensor]]:
    cos, sin, other_cos, other_sin = tables
    both = _rotated(x, cos, sin, False, heads_first(x)), _rotated(x, other_cos, other_sin, False, heads_first(x))
    return both, tables, ()


def _rotate_both_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The two gradients are added without a tensor for each."""
    total: Tensor | None = None
    for grad, cos, sin in zip(grads, saved.tensors[::2], saved.tensors[1::2], strict=True):
        if grad is not None:
            total = _rotated(grad, cos, sin, True, _contiguous(grad) if total is None else total, base=total)
    return total, None, None, None, None


def _rotate_keys(keys_values: Tensor, cos: Tensor, sin: Tensor, *, save: bool) -> Kept[tuple[Tensor, ...]]:
    k, v = keys_values.chunk(2, -2)
    rotated = _rotated(k, cos, sin, False, heads_first(k))
    return (rotated, k, v), (cos, sin), (keys_values.shape, keys_values.dtype)


def _rotate_keys_backward(
    saved: Saved, grad_rotated: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients land side by side, as the projection has them."""
    (cos, sin), (shape, dtype) = saved
    grad = torch.empty(shape, dtype=dtype)
    into_k, into_v = grad.chunk(2, -2)
    if grad_rotated is None:
        _fill(into_k, grad_k)
    else:
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


def _branch(x_btd: Tensor, num_rows: tuple[int, ...], *, save: bool) -> Kept[tuple[Tensor, ...]]:
    return tuple(x_btd[:, :count] for count in num_rows), (), (x_btd.shape, x_btd.dtype)


def _branch_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor, None]:
    """The branches' gradients are added in one pass, without filling up what is shorter."""
    shape, dtype = saved.facts
    total = torch.empty(shape, dtype=dtype)
    operands = [None if grad is None else rows_contiguous(grad) for grad in grads]
    library.call("add_rows", dtype, *operands, total)
    return total, None


def _split(x: Tensor, widths: tuple[int, ...], *, save: bool) -> Kept[tuple[Tensor, ...]]:
    return x.split(widths, -1), (), (x.shape, x.dtype, widths)


def _split_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor, None]:
    """Join the parts' gradients on all threads; torch takes one."""
    shape, dtype, (first, second, _) = saved.facts
    joined = torch.empty(shape, dtype=dtype)
    operands = [None if grad is None else _rows(grad) for grad in grads]
    library.call("join_columns", dtype, *operands, _rows(joined), first, first + second)
    return joined, None


def _cross_entropy_(inputs: RowInputs) -> RowLosses:
    logits_sv, target_s, z_loss_weight, with_gradient = inputs
    if logits_sv.stride(-1) != 1:
        raise ValueError(f"cross_entropy_ works in place on contiguous rows; these have strides {logits_sv.stride()}.")
    _require(target_s.shape == logits_sv.shape[:1], logits_sv, target_s)
    if target_s.numel() and not is_shapes_only():
        lowest, highest = target_s.aminmax()
        if lowest < 0 or highest >= logits_sv.shape[1]:
            raise IndexError(f"targets {int(lowest)} .. {int(highest)} for {logits_sv.shape[1]} classes.")
    nll_s, log_z_s = logits_sv.new_empty(2, logits_sv.shape[0])
    scalars = (float(z_loss_weight), int(with_gradient))
    library.call("cross_entropy", logits_sv.dtype, logits_sv, target_s, nll_s, log_z_s, *scalars)
    return RowLosses(nll_s, log_z_s)


def _other_dtype(inputs: AddNormInputs | GatedInputs | GatedNormInputs) -> str | None:
    """Of the two tensors, the first and the second."""
    first, second = inputs[0].dtype, inputs[1].dtype
    return None if first == second else f"tensors of {first} and {second}"


def _other_result(inputs: NormInputs | AddNormInputs) -> str | None:
    x, dtype = inputs.x, inputs.dtype
    return None if dtype in (None, x.dtype) else f"a result of {dtype}"


def _rotation_refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if not x.dtype == cos.dtype == sin.dtype:
        return f"x of {x.dtype} and a table of {cos.dtype}"
    if cos.shape != sin.shape or not 3 <= x.dim() <= MAX_DIMS:
        return f"{x.dim()} dimensions, or cosines and sines of different shapes"
    leading, table = x.shape[:-2], cos.shape[:-1]
    broadcasts = (
        x.shape[-1] == 2 * cos.shape[-1]
        and len(table) <= len(leading)
        and all(n in (1, m) for n, m in zip(reversed(table), reversed(leading), strict=False))
    )
    return None if broadcasts else "a table that does not broadcast to x"


def _both_refuse(inputs: RotateBothInputs) -> str | None:
    return _rotation_refuses(inputs.x, *inputs.first) or _rotation_refuses(inputs.x, *inputs.second)


def _keys_refuse(inputs: RotateKeysInputs) -> str | None:
    return _rotation_refuses(inputs.keys_values.chunk(2, -2)[0], inputs.cos, inputs.sin)


def _without_gradient(inputs: BranchInputs | SplitInputs) -> str | None:
    return None if inputs[0].requires_grad and torch.is_grad_enabled() else "no gradient is wanted"


def _require(fits: bool, *inputs: Tensor) -> None:
    """Raise ValueError if shapes, which kernels trust, do not fit together."""
    if not fits:
        raise ValueError(f"these shapes do not go together: {', '.join(str(tuple(x.shape)) for x in inputs)}.")


def _contiguous(x: Any) -> Tensor:
    """Fresh memory for a tensor of x's shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _inverses(x: Tensor, save: bool) -> Tensor | None:
    """Room for a number per row, which the backward reads."""
    return x.new_empty(x.shape[:-1].numel()) if save else None


def _rows(x: Any) -> Tensor:
    """x as [rows, width], rows contiguous: a view if it can be one."""
    return rows_contiguous(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


_norm_call = differentiable(_norm, _norm_backward)
_add_norm_call = differentiable(_add_norm, _add_norm_backward, materialize_grads=False)
_gated_norm_call = differentiable(_gated_norm, _gated_norm_backward)
_gated_call = differentiable(_gated, _gated_backward)
_gated_product_call = differentiable(_gated_product, _gated_product_backward)
_rotate_call = differentiable(_rotate, _rotate_backward)
_rotate_both_call = differentiable(_rotate_both, _rotate_both_backward, materialize_grads=False)
_rotate_keys_call = differentiable(_rotate_keys, _rotate_keys_backward, materialize_grads=False)
_branch_call = differentiable(_branch, _branch_backward, materialize_grads=False)
_split_call = differentiable(_split, _split_backward, materialize_grads=False)

rms_norm = Path[NormInputs, Tensor](
    lambda inputs: _norm_call(inputs.x, inputs.weight.to(inputs.x.dtype), inputs.eps), _other_result, TOLERANCE
)
add_rms_norm = Path[AddNormInputs, SumAndNorm](
    lambda inputs: SumAndNorm(*_add_norm_call(*inputs[:2], inputs.weight.to(inputs.x.dtype), inputs.eps)),
    lambda inputs: _other_dtype(inputs) or _other_result(inputs),
    TOLERANCE,
)
gated = Path[GatedInputs, Tensor](lambda inputs: _gated_call(*inputs), _other_dtype, TOLERANCE)
gated_rms_norm = Path[GatedNormInputs, Tensor](
    lambda inputs: _gated_norm_call(*inputs[:2], inputs.weight.to(inputs.x.dtype), inputs.eps), _other_dtype, TOLERANCE
)
gated_product = Path[GateUpInputs, Tensor](lambda inputs: _gated_product_call(*inputs), tolerance=TOLERANCE)
rotate = Path[RotateInputs, Tensor](
    lambda inputs: _rotate_call(*inputs), lambda inputs: _rotation_refuses(*inputs[:3]), TOLERANCE
)
rotate_both = Path[RotateBothInputs, tuple[Tensor, Tensor]](
    lambda inputs: _rotate_both_call(inputs.x, *inputs.first, *inputs.second), _both_refuse, TOLERANCE
)
rotate_keys = Path[RotateKeysInputs, KeysAndValues](
    lambda inputs: KeysAndValues(*_rotate_keys_call(*inputs)), _keys_refuse, TOLERANCE
)
branch = Path[BranchInputs, Three](lambda inputs: _branch_call(*inputs), _without_gradient, TOLERANCE)
split = Path[SplitInputs, Three](lambda inputs: _split_call(*inputs), _without_gradient, TOLERANCE)
cross_entropy_ = Path(_cross_entropy_, tolerance=TOLERANCE)
