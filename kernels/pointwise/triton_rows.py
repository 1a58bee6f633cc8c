"""Device code of the operators that reduce over a row: norms, and the loss of a row of logits.

A program takes ROWS rows at a time, each in one piece: a row is read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, row, stride, column, mask):
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, row, stride, column, mask, value):
    tl.store(ptr + row[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(weight_ptr, column, width):
    return tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_kernel(
    x_ptr, delta_ptr, gate_ptr, weight_ptr, total_ptr, out_ptr, inverse_ptr,
    num_rows, width, x_stride, delta_stride, gate_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of x, of x + delta (the sum goes to total_ptr) or of x * SiLU(gate). Grid: tiles of rows.

    out, total: dense rows.  inverse: 1 / root mean square of each row, for the backward. None: not wanted; without a
    total the sum is not rounded.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    value = load_tile(x_ptr, row, x_stride, column, mask)
    if delta_ptr is not None:
        value += load_tile(delta_ptr, row, delta_stride, column, mask)
        if total_ptr is not None:
            value = value.to(total_ptr.dtype.element_ty).to(tl.float32)  # the norm of what is kept
            store_tile(total_ptr, row, width, column, mask, value)
    if gate_ptr is not None:
        gate = load_tile(gate_ptr, row, gate_stride, column, mask)
        value *= gate * tl.sigmoid(gate)
    inverse = 1 / tl.sqrt_rn(tl.sum(value * value, 1) / width + eps)
    normed = value * inverse[:, None] * load_weight(weight_ptr, column, width)
    store_tile(out_ptr, row, width, column, mask, normed)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + row, inverse, mask=row < num_rows)


@triton.jit
def norm_backward_kernel(
    x_ptr, delta_ptr, gate_ptr, weight_ptr, inverse_ptr, grad_ptr, base_ptr,
    grad_x_ptr, grad_delta_ptr, grad_gate_ptr, again_ptr, share_ptr,
    num_rows, width, x_stride, delta_stride, gate_stride, grad_stride, base_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of norm_kernel, of whose sum x is the total, or x + delta. Grid: programs, with tiles far apart.

    base: a gradient of x to add to, or None.  grad_delta: the gradient of x in another dtype, or None.
    again: where the forward's result is written once more, or None.
    share: room for what each program adds to the weight's gradient, [programs, width].
    """
    column = tl.arange(0, BLOCK)
    weight = load_weight(weight_ptr, column, width)
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < num_rows)[:, None] & (column < width)[None, :]
        inverse = tl.load(inverse_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        x = load_tile(x_ptr, row, x_stride, column, mask)
        if delta_ptr is not None:
            x += load_tile(delta_ptr, row, delta_stride, column, mask)
        value = x
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, row, gate_stride, column, mask)
            open_share = tl.sigmoid(gate)
            value = x * gate * open_share
        grad = load_tile(grad_ptr, row, grad_stride, column, mask)
        normed = value * inverse
        if again_ptr is not None:
            again = x * (gate * open_share) if gate_ptr is not None else x  # in the forward's order
            store_tile(again_ptr, row, width, column, mask, again * inverse * weight)
        share += grad * normed
        grad *= weight
        grad_value = inverse * (grad - normed * (tl.sum(grad * normed, 1) / width)[:, None])
        if base_ptr is not None:
            grad_value += load_tile(base_ptr, row, base_stride, column, mask)
        if gate_ptr is not None:
            grad_gate = grad_value * x * open_share * (1 + gate * (1 - open_share))
            store_tile(grad_gate_ptr, row, width, column, mask, grad_gate)
            grad_value *= gate * open_share
        store_tile(grad_x_ptr, row, width, column, mask, grad_value)
        if grad_delta_ptr is not None:
            store_tile(grad_delta_ptr, row, width, column, mask, grad_value)
    share_ptr += tl.program_id(0) * width
    tl.store(share_ptr + column, tl.sum(share, 0), mask=column < width)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, nll_ptr, log_z_ptr, width, stride, z_loss_weight,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See RowInputs. Grid: rows. The maximum and the sum are one pass over the row, what replaces it a second.

    A target that is no class makes the loss NaN: it is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    column = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1e30, tl.float32)  # finite: -inf - -inf is not 0
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        x = tl.load(logits_ptr + first + column, mask=first + column < width, other=float("-inf")).to(tl.float32)
        new_most = tl.maximum(most, x)
        total = total * tl.exp(most - new_most) + tl.exp(x - new_most)
        most = new_most
    peak = tl.max(most, 0)
    log_z = peak + tl.log(tl.sum(total * tl.exp(most - peak), 0))
    target = tl.load(target_ptr + row)
    is_class = (target >= 0) & (target < width)
    picked = tl.load(logits_ptr + target, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(nll_ptr + row, log_z - picked)
    tl.store(log_z_ptr + row, log_z)
    if WITH_GRADIENT:
        hit = 1 / (1 + 2 * z_loss_weight * log_z)
        for first in range(0, width, BLOCK):
            mask = first + column < width
            x = tl.load(logits_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
            grad = tl.exp(x - log_z) - tl.where(first + column == target, hit, 0.0)
            tl.store(logits_ptr + first + column, grad.to(logits_ptr.dtype.element_ty), mask=mask)
