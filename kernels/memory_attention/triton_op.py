"""Memory attention in Triton: limits, and registration with torch so that torch.compile sees two nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch import Launch
from kernels.memory_attention.triton_limits import padded_sets, require_dtypes, require_group, rows_contiguous
from kernels.memory_attention.triton_plan import (
    CONFIGS,
    Call,
    Saved,
    most_query_heads,
    plan_forward,
    plan_key_grad,
    plan_query_grad,
    plan_slot_grad,
    row_bytes,
)
from kernels.memory_attention.triton_step import step_case
from kernels.tuning import architecture

__all__ = ["CONFIGS", "memory_attention_triton", "report_cases"]


def memory_attention_triton(
    q_bthp: Tensor,
    k_bshp: Tensor,
    v_bshp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    chunk_size: int | None = None,
    doc_ids_bt: Tensor | None = None,
    num_past: int = 0,
) -> Tensor:
    """See kernels.memory_attention.

    Raises: ValueError: head_dim, dtype or number of query heads a key/value head that the kernels do not take.
    """
    sets = padded_sets(q_bthp, k_bshp, v_bshp, fading, eidetic)
    require_dtypes(sets, same=True)
    require_group(q_bthp, k_bshp, most_query_heads(row_bytes(q_bthp), architecture(q_bthp.device)))
    index_bjm, span = (eidetic[3], chunk_size) if eidetic is not None else (None, None)
    out_bthp, _ = _forward(
        *sets, index_bjm, doc_ids_bt, min(window_size, k_bshp.shape[1]), span or q_bthp.shape[1], num_past,
        q_bthp.shape[-1] ** -0.5,
    )  # fmt: skip
    return out_bthp[..., : q_bthp.shape[-1]]


@torch.library.custom_op("bmojo::memory_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fading_k: Tensor | None,
    fading_v: Tensor | None,
    eidetic_q: Tensor | None,
    eidetic_k: Tensor | None,
    eidetic_v: Tensor | None,
    index: Tensor | None,
    docs: Tensor | None,
    window_size: int,
    chunk_size: int,
    num_past: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The attention, and the base-2 logarithm of its softmax's denominators [b, t, h]."""
    call = _call(
        q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index, docs,
        window_size, chunk_size, num_past, scale,
    )  # fmt: skip
    out, lse = _empty_outputs(q)
    for launch in plan_forward(call, out, lse, architecture(q.device)):
        launch.run()
    return out, lse


@_forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@torch.library.custom_op("bmojo::memory_attention_backward", mutates_args=())
def _backward(
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fading_k: Tensor | None,
    fading_v: Tensor | None,
    eidetic_q: Tensor | None,
    eidetic_k: Tensor | None,
    eidetic_v: Tensor | None,
    index: Tensor | None,
    docs: Tensor | None,
    window_size: int,
    chunk_size: int,
    num_past: int,
    scale: float,
) -> list[Tensor]:
    """Gradients of the floating-point inputs that are there, in their order."""
    call = _call(
        q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index, docs,
        window_size, chunk_size, num_past, scale,
    )  # fmt: skip
    saved = Saved(out, lse, rows_contiguous(grad_out), torch.empty_like(lse))
    grads = _empty_grads(q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v)
    for launch in plan_backward(call, saved, grads, architecture(q.device)):
        launch.run()
    return grads


@_backward.register_fake
def _(out: Tensor, lse: Tensor, grad_out: Tensor, *args: Any) -> list[Tensor]:
    return _empty_grads(*args[:8])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.sizes = inputs[10:]


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    grads = iter(_backward(out, lse, grad_out, *inputs, *ctx.sizes))
    return *(None if x is None else next(grads) for x in inputs[:8]), None, None, *(None for _ in ctx.sizes)


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


def plan_backward(call: Call, saved: Saved, grads: list[Tensor], arch: str) -> list[Launch]:
    """Launches that fill `grads`, in the order of the inputs that are there."""
    grad_q, grad_k, grad_v, *others = grads
    grad_eidetic_q = None if call.eidetic is None else others[-3]
    launches = plan_query_grad(call, saved, grad_q, grad_eidetic_q, arch)
    launches += plan_key_grad(call, saved, 0, (call.k, call.v), (grad_k, grad_v), arch)
    if call.fading is not None:
        launches += plan_key_grad(call, saved, call.window_size, call.fading, (others[0], others[1]), arch)
    if call.eidetic is not None:
        shape = (call.q.shape[0], call.num_chunks * call.num_slots, *call.k.shape[2:])
        slot_grads = call.q.new_empty(shape, dtype=torch.float32), call.q.new_empty(shape, dtype=torch.float32)
        launches += plan_slot_grad(call, saved, slot_grads, (others[-2], others[-1]), arch)
    return launches


def _call(*inputs: Any) -> Call:
    sets: list[Any] = [x if x is None else rows_contiguous(x) for x in inputs[:8]]
    index, docs = (x if x is None else x.contiguous() for x in inputs[8:10])
    q, k, v, fading_k, fading_v, *eidetic = sets
    fading = None if fading_k is None else (fading_k, fading_v)
    return Call(q, k, v, fading, None if index is None else (*eidetic, index), docs, *inputs[10:])


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_grads(*inputs: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at the sizes that `make kernel-report` compiles."""
    return [case for head_dim in (64, 128) for case in [*_report_case(arch, head_dim), step_case(arch, head_dim)]]


def _report_case(arch: str, head_dim: int) -> list[tuple[str, list[Launch]]]:
    batch, t, heads, kv_heads, window_size, chunk_size, num_slots = 8, 4096, 16, 4, 512, 256, 128
    q = torch.empty(batch, t, heads, head_dim, dtype=torch.bfloat16, device="meta")
    k = q[:, :, :kv_heads].contiguous()
    fading = k[:, window_size:].contiguous()
    index = torch.empty(batch, t // chunk_size, num_slots, dtype=torch.int64, device="meta")
    call = Call(q, k, k, (fading, fading), (q, k, k, index), None, window_size, chunk_size, 0, head_dim**-0.5)
    out, lse = _empty_outputs(q)
    saved, grads = Saved(out, lse, q, torch.empty_like(lse)), _empty_grads(q, k, k, fading, fading, q, k, k)
    return [
        (f"forward, head_dim {head_dim}", plan_forward(call, out, lse, arch)),
        (f"backward, head_dim {head_dim}", plan_backward(call, saved, grads, arch)),
    ]
