"""The small operators in Triton: shapes, memory, gradients. Tensors may differ in dtype, so that no cast is needed.

Under torch.compile they give way to the plain formulas, which Inductor fuses with their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.again import is_kept_as_terms, keeps_everything, keeps_small_results, made_by, note_terms
from kernels.gpu.launch import Launch
from kernels.operator import Kept, Path, Saved, differentiable
from kernels.pointwise import triton_plan as plan
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
    Table,
    TableInputs,
    Three,
)
from kernels.pointwise.torch_path import heads_first

# bfloat16: two roundings of 2^-8, on either side; the interpreter cuts where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MAX_WIDTH = 16384  # of a row that one program normalises


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None, *, save: bool) -> Kept[Tensor]:
    _require(weight.shape == x.shape[-1:], x, weight)
    out, inverse = x.new_empty(x.shape, dtype=dtype), _inverses(x, save)
    plan.norm(_rows(x), None, None, weight.contiguous(), None, out, inverse, eps).run()
    return out, (x, weight, inverse), ()


def _norm_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse = saved.tensors
    grad_x = x.new_empty(x.shape)
    grad_weight = _norm_gradients(x, None, None, weight, inverse, grad, None, grad_x, None, None, None)
    return grad_x, grad_weight, None, None


def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None, *, save: bool
) -> Kept[tuple[Tensor, Tensor]]:
    _require(weight.shape == x.shape[-1:] and delta.shape == x.shape, x, delta, weight)
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, delta.dtype))
    normed, inverse = x.new_empty(x.shape, dtype=dtype or total.dtype), _inverses(x, save)
    plan.norm(_rows(x), _rows(delta), None, weight.contiguous(), total, normed, inverse, eps).run()
    terms = (x, delta) if _keeps_terms(x, delta) else (total, None)
    return (total, normed), (*terms, weight, inverse), (x.dtype, delta.dtype)


def _keeps_terms(x: Tensor, delta: Tensor) -> bool:
    """Whether to keep x and delta in place of their sum: every second sum along the stream, where terms are smaller.

    x was kept by the norm before, unless that has kept its own terms.
    """
    return delta.element_size() < x.element_size() and not (keeps_everything() or is_kept_as_terms(x))


def _normed_again(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor]:
    """The norm of x, or of a sum that was not rounded."""
    out = x.new_empty(x.shape, dtype=dtype)
    plan.norm(_rows(x), None if delta is None else _rows(delta), None, weight.contiguous(), None, out, None, eps).run()
    return (out,)


def _add_norm_backward(
    saved: Saved, grad_total: Tensor | None, grad_normed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the sum and of its norm are added without a tensor for each, in the dtype of each term."""
    (x, delta, weight, inverse), (dtype, delta_dtype) = saved
    if grad_normed is None:
        grad, grad_delta = (None if grad_total is None else grad_total.to(kind) for kind in (dtype, delta_dtype))
        return grad, grad_delta, None, None, None
    grad = x.new_empty(x.shape, dtype=dtype)
    other = None if delta_dtype == dtype else x.new_empty(x.shape, dtype=delta_dtype)
    grad_weight = _norm_gradients(x, delta, None, weight, inverse, grad_normed, grad_total, grad, other, None, None)
    return grad, grad if other is None else other, grad_weight, None, None


def gated_norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, save: bool) -> Kept[Tensor]:
    """Keep the inputs and one number per row: the product is cheaper to compute again than to read."""
    _require(gate.shape == x.shape and weight.shape == x.shape[-1:], x, gate, weight)
    out, inverse = gate.new_empty(gate.shape), _inverses(x, save)
    plan.norm(_rows(x), None, _rows(gate), weight.contiguous(), None, out, inverse, eps).run()
    return out, (x, gate, weight, inverse), ()


def gated_norm_backward(saved: Saved, grad: Tensor, again: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """again: where the forward's result is written once more: cheaper than to compute it alone."""
    x, gate, weight, inverse = saved.tensors
    grad_x, grad_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    grad_weight = _norm_gradients(x, None, gate, weight, inverse, grad, None, grad_x, None, grad_gate, again)
    return grad_x, grad_gate, grad_weight, None


def _norm_gradients(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, weight: Tensor, inverse: Tensor, grad: Tensor,
    base: Tensor | None, grad_x: Tensor, grad_delta: Tensor | None, grad_gate: Tensor | None, again: Tensor | None,
) -> Tensor:  # fmt: skip
    """Fill the gradients of rows; return the weight's, the sum of what each program leaves."""
    x, grad, weights = _rows(x), _rows(grad), weight.contiguous()
    delta, gate, base = (None if rows is None else _rows(rows) for rows in (delta, gate, base))
    launch = plan.norm_backward(x, delta, gate, weights, inverse, grad, base, grad_x, grad_delta, grad_gate, again)
    launch.run()
    share: Tensor = launch.args["share_ptr"]
    return share.sum(0).to(weight.dtype)


def _gated(x: Tensor, gate: Tensor, *, save: bool) -> Kept[Tensor]:
    _require(gate.shape == x.shape, x, gate)
    out = gate.new_empty(gate.shape)
    plan.gated(_rows(x), _rows(gate), out).run()
    return out, (x, gate), ()


def _gated_backward(saved: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, gate = saved.tensors
    grad_x, grad_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    plan.gated_backward(_rows(x), _rows(gate), _rows(grad), grad_x, grad_gate).run()
    return grad_x, grad_gate


def gated_product_forward(gate_up: Tensor, *, save: bool) -> Kept[Tensor]:
    *leading, width = gate_up.shape
    _require(width % 2 == 0, gate_up)
    gate, up = _rows(gate_up).chunk(2, -1)
    out = gate_up.new_empty(*leading, width // 2)
    plan.gated(up, gate, out).run()
    return out, (gate_up,), ()


def gated_product_backward(saved: Saved, grad: Tensor, again: Tensor | None = None) -> Tensor:
    """The gradients land side by side too, without a copy. again: as in gated_norm_backward."""
    (gate_up,) = saved.tensors
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    (gate, up), (grad_gate, grad_up) = (_rows(both).chunk(2, -1) for both in (gate_up, grad_gate_up))
    plan.gated_backward(up, gate, _rows(grad), grad_up, grad_gate, again).run()
    return grad_gate_up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, *, save: bool) -> Kept[Tensor]:
    out = heads_first(x)
    plan.rotate(_channels(x), out, None, (cos, sin), None, back=inverse).run()
    return out, (cos, sin), (inverse,)


def _rotate_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cos, sin), (inverse,) = saved
    grad_x = grad.new_empty(grad.shape)  # as projections have it
    plan.rotate(_channels(grad), grad_x, None, (cos, sin), None, back=not inverse).run()
    return grad_x, None, None, None


def _rotate_both(x: Tensor, *tables: Tensor, save: bool) -> Kept[tuple[Tensor, Tensor]]:
    cos, sin, other_cos, other_sin = tables
    first, second = heads_first(x), heads_first(x)
    plan.rotate(_channels(x), first, second, (cos, sin), (other_cos, other_sin), back=False).run()
    return (first, second), tables, (x.shape, x.dtype, x.device)


def _rotate_both_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The two gradients are added without a tensor for each."""
    (cos, sin, other_cos, other_sin), (shape, dtype, device) = saved
    first, second = (None if grad is None else _channels(grad) for grad in grads)
    total = torch.empty(shape, dtype=dtype, device=device)
    plan.rotate_back(first, second, None, total, (cos, sin), (other_cos, other_sin)).run()
    return total, None, None, None, None


def _rotate_keys(keys_values: Tensor, cos: Tensor, sin: Tensor, *, save: bool) -> Kept[tuple[Tensor, ...]]:
    k, v = keys_values.chunk(2, -2)
    rotated = heads_first(k)
    plan.rotate(_channels(k), rotated, None, (cos, sin), None, back=False).run()
    return (rotated, k, v), (cos, sin), (keys_values.shape, keys_values.dtype, keys_values.device)


def _rotate_keys_backward(
    saved: Saved, grad_rotated: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients land side by side, as the projection has them."""
    (cos, sin), (shape, dtype, device) = saved
    grad = torch.empty(shape, dtype=dtype, device=device)
    into_k, into_v = grad.chunk(2, -2)
    rotated, base, beside = (None if x is None else _channels(x) for x in (grad_rotated, grad_k, grad_v))
    plan.rotate_back(rotated, None, base, into_k, (cos, sin), None, beside).run()
    if grad_v is None:
        into_v.zero_()
    return grad, None, None


def _branch(x_btd: Tensor, num_rows: tuple[int, ...], *, save: bool) -> Kept[tuple[Tensor, ...]]:
    return tuple(x_btd[:, :count] for count in num_rows), (), (x_btd.shape, x_btd.dtype, x_btd.device)


def _branch_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor, None]:
    """The branches' gradients are added in one pass, without filling up what is shorter."""
    shape, dtype, device = saved.facts
    total = torch.empty(shape, dtype=dtype, device=device)
    first, second, third = (None if grad is None else _channels(grad) for grad in grads)
    plan.add_rows(first, second, third, total).run()
    return total, None


def _split(x: Tensor, widths: tuple[int, ...], *, save: bool) -> Kept[tuple[Tensor, ...]]:
    return x.split(widths, -1), (), (x.shape, x.dtype, x.device, widths)


def _split_backward(saved: Saved, *grads: Tensor | None) -> tuple[Tensor, None]:
    """Join the parts' gradients in one pass."""
    shape, dtype, device, widths = saved.facts
    joined = torch.empty(shape, dtype=dtype, device=device)
    join(grads, joined, widths)
    return joined, None


def join(parts: Sequence[Tensor | None], into: Tensor, widths: Sequence[int]) -> None:
    """Write three parts side by side; zeros for those that are None, and for the rest of the rows."""
    first, second, third = (None if part is None else _rows(part) for part in parts)
    plan.join(first, second, third, _rows(into), widths).run()


def _cross_entropy_(inputs: RowInputs) -> RowLosses:
    logits_sv, target_s, z_loss_weight, with_gradient = inputs
    if logits_sv.stride(-1) != 1:
        raise ValueError(f"cross_entropy_ works in place on contiguous rows; these have strides {logits_sv.stride()}.")
    nll_s, log_z_s = logits_sv.new_empty(2, logits_sv.shape[0], dtype=torch.float32)
    if logits_sv.shape[0]:
        plan.cross_entropy(logits_sv, target_s.contiguous(), nll_s, log_z_s, z_loss_weight, with_gradient).run()
    return RowLosses(nll_s, log_z_s)


def _refuses(*tensors: Tensor) -> str | None:
    """The reason why these tensors are not for Triton, if any."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain formulas"
    for x in tensors:
        if x.dtype not in TOLERANCE:
            return f"{x.dtype} in Triton"
    return None


def _norm_refuses(inputs: NormInputs | AddNormInputs | GatedNormInputs) -> str | None:
    x, weight = inputs.x, inputs.weight
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}, more than {MAX_WIDTH}"
    if isinstance(inputs, NormInputs):
        return _refuses(x, weight)
    return _refuses(x, weight, inputs.delta if isinstance(inputs, AddNormInputs) else inputs.gate)


def _rotary_table(inputs: TableInputs) -> Table:
    position, head_dim, theta, dtype = inputs
    cos, sin = torch.empty(2, *position.shape, head_dim // 2, dtype=dtype, device=position.device)
    plan.rotary_table(position.contiguous(), theta, cos, sin).run()
    return cos, sin


def _table_refuses(inputs: TableInputs) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain formulas"
    return None if inputs.dtype in TOLERANCE and inputs.theta > 1 else f"{inputs.dtype} or theta {inputs.theta}"


def _rotation_refuses(x: Tensor, *tables: Tensor) -> str | None:
    leading = x.shape[:-2]
    for table in tables:
        if not (x.shape[-1] == 2 * table.shape[-1] and 1 <= len(leading) <= 2 and table.dim() - 1 <= len(leading)):
            return "more than four dimensions, or a table that does not broadcast to x"
        sizes = zip(reversed(table.shape[:-1]), reversed(leading), strict=False)
        if not all(size in (1, full) for size, full in sizes):
            return "a table that does not broadcast to x"
    return _refuses(x, *tables)


def _parts_refuse(x: Tensor) -> str | None:
    return _refuses(x) if x.requires_grad and torch.is_grad_enabled() else "no gradient is wanted"


def _require(fits: bool, *inputs: Tensor) -> None:
    """Raise ValueError if shapes, which kernels trust, do not fit together."""
    if not fits:
        raise ValueError(f"these shapes do not go together: {', '.join(str(tuple(x.shape)) for x in inputs)}.")


def _inverses(x: Tensor, save: bool) -> Tensor | None:
    """Room for a number per row, which the backward reads."""
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) if save else None


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width], rows contiguous: a view if it can be one."""
    return _channels(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def _channels(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: x itself if it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: 8 x 4096 tokens, d 1024, 16 heads of 64, MLP 2816."""
    x = torch.empty(8, 4096, 1024, dtype=torch.bfloat16, device="meta")
    stream, weight, inverse = x.float(), x.new_empty(1024, dtype=torch.float32), x.new_empty(8 * 4096).float()
    gate_up = x.new_empty(8, 4096, 2 * 2816)
    gate, up = gate_up.chunk(2, -1)
    product, heads = x.new_empty(gate.shape), x.unflatten(-1, (16, 64))
    table = stream.new_empty(4096, 32)
    both, logits, target = (table, table), x.new_empty(8192, 32768), x.new_empty(8192, dtype=torch.int64)
    return [
        ("add_rms_norm", [plan.norm(stream, x, None, weight, stream, x, inverse, 1e-5)]),
        ("add_rms_norm, backward", [plan.norm_backward(stream, x, None, weight, inverse, x, stream, stream, x, None)]),
        ("gated_rms_norm", [plan.norm(x, None, x, weight, None, x, inverse, 1e-5)]),
        ("gated_rms_norm, backward", [plan.norm_backward(x, None, x, weight, inverse, x, None, x, None, x, x)]),
        ("gated_product", [plan.gated(up, gate, product)]),
        ("gated_product, backward", [plan.gated_backward(up, gate, product, up, gate, product)]),
        ("rotary_table", [plan.rotary_table(target, 1e4, logits[:, :32].float(), logits[:, :32].float())]),
        ("rotate_both", [plan.rotate(heads, heads_first(heads), heads_first(heads), both, both, back=False)]),
        ("rotate_both, backward", [plan.rotate_back(heads, heads, None, heads, both, both)]),
        ("split, backward", [plan.join(x, x, x, x.new_empty(8, 4096, 3072), (1024, 1024, 1024))]),
        ("branch, backward", [plan.add_rows(x, x, x[:, :3584], x)]),
        ("cross_entropy_", [plan.cross_entropy(logits, target, inverse[:8192], inverse[:8192], 0.0, True)]),
    ]


_norms = differentiable(_norm, _norm_backward)
_add_norms = differentiable(_add_norm, _add_norm_backward, materialize_grads=False)
_gated_norms = differentiable(gated_norm_forward, gated_norm_backward)
_gates = differentiable(_gated, _gated_backward)
_gated_products = differentiable(gated_product_forward, gated_product_backward)
_rotations = differentiable(_rotate, _rotate_backward)
_both_rotations = differentiable(_rotate_both, _rotate_both_backward, materialize_grads=False)
_key_rotations = differentiable(_rotate_keys, _rotate_keys_backward, materialize_grads=False)
_branches = differentiable(_branch, _branch_backward, materialize_grads=False)
_splits = differentiable(_split, _split_backward, materialize_grads=False)


def _run_norm(inputs: NormInputs) -> Tensor:
    x, weight, eps, dtype = inputs
    normed: Tensor = _norms(*inputs)
    if not keeps_small_results():
        made_by(_normed_again, (x, None, weight, eps, dtype or x.dtype), normed)
    return normed


def _run_add_norm(inputs: AddNormInputs) -> SumAndNorm:
    x, delta, weight, eps, _ = inputs
    keeps_terms = _keeps_terms(x, delta)
    total, normed = _add_norms(*inputs)
    terms = (x, delta) if keeps_terms else (total, None)
    if not keeps_small_results():
        made_by(_normed_again, (*terms, weight, eps, normed.dtype), normed)
    if keeps_terms and total.requires_grad:
        note_terms(total)
    return SumAndNorm(total, normed)


def _run_rotate(inputs: RotateInputs) -> Tensor:
    rotated: Tensor = _rotations(*inputs)
    if not keeps_small_results():
        made_by(_rotated_again, inputs, rotated)
    return rotated


def _rotated_again(*inputs: Any) -> tuple[Tensor]:
    return (_rotations(*inputs),)


def _run_rotate_both(inputs: RotateBothInputs) -> tuple[Tensor, Tensor]:
    given = (inputs.x, *inputs.first, *inputs.second)
    first, second = _both_rotations(*given)
    if not keeps_small_results():
        made_by(_both_rotations, given, first, second)
    return first, second


def _run_rotate_keys(inputs: RotateKeysInputs) -> KeysAndValues:
    """Keys that are not rotated are kept anyway, side by side with values."""
    found = KeysAndValues(*_key_rotations(*inputs))
    made_by(_key_rotations, inputs, found.rotated)
    return found


rms_norm = Path(_run_norm, _norm_refuses, TOLERANCE)
add_rms_norm = Path(_run_add_norm, _norm_refuses, TOLERANCE)
gated = Path[GatedInputs, Tensor](lambda inputs: _gates(*inputs), lambda inputs: _refuses(*inputs), TOLERANCE)
gated_rms_norm = Path[GatedNormInputs, Tensor](lambda inputs: _gated_norms(*inputs), _norm_refuses, TOLERANCE)
gated_product = Path[GateUpInputs, Tensor](
    lambda inputs: _gated_products(*inputs), lambda inputs: _refuses(*inputs), TOLERANCE
)
rotary_table = Path(_rotary_table, _table_refuses, TOLERANCE)
rotate = Path(_run_rotate, lambda inputs: _rotation_refuses(*inputs[:3]), TOLERANCE)
rotate_both = Path[RotateBothInputs, tuple[Tensor, Tensor]](
    _run_rotate_both,
    lambda inputs: _rotation_refuses(inputs.x, *inputs.first, *inputs.second),
    TOLERANCE,
)
rotate_keys = Path(_run_rotate_keys, lambda inputs: _rotation_refuses(*inputs), TOLERANCE)
branch = Path[BranchInputs, Three](
    lambda inputs: _branches(*inputs), lambda inputs: _parts_refuse(inputs.x_btd), TOLERANCE
)
split = Path[SplitInputs, Three](lambda inputs: _splits(*inputs), lambda inputs: _parts_refuse(inputs.x), TOLERANCE)
cross_entropy_ = Path(_cross_entropy_, lambda inputs: _refuses(inputs.logits_sv), TOLERANCE)
