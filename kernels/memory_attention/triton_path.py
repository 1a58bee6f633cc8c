"""Memory attention and its decoding step in Triton: limits, and the launches of a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gpu.launch import Launch
from kernels.gpu.tuning import architecture
from kernels.memory_attention.reference import AttentionInputs, FlatInputs, StepInputs
from kernels.memory_attention.triton_plan import (
    Saved,
    SetGradients,
    is_tileable,
    most_query_heads,
    new_lse,
    plan_backward,
    plan_forward,
    row_bytes,
)
from kernels.memory_attention.triton_step import MAX_ROWS, FlatStep, plan_step, step_case
from kernels.operator import Path, library_op

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # products are summed tile by tile
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256  # the shortest side of a tensor core's product; what registers hold

_INTEGERS = ("index_bjm", "doc_ids_bt", "slot_position", "position")  # tensors of integers

Flat = TypeVar("Flat", FlatInputs, FlatStep)


def _refuses(inputs: AttentionInputs) -> str | None:
    q, k = inputs.q_bthp, inputs.k_bshp
    sets = FlatInputs.of(inputs).sets
    return (
        _head_dim_limit(q)
        or _dtype_limit(sets, same=True)
        or _group_limit(q, k, most_query_heads(row_bytes(q), architecture(q.device)))
    )


def _step_refuses(inputs: StepInputs) -> str | None:
    q, k = inputs.q_bhp, inputs.k_brhp
    return _head_dim_limit(q) or _group_limit(q, k, MAX_ROWS) or _dtype_limit(FlatStep.of(inputs).sets, same=False)


def _head_dim_limit(q: Tensor) -> str | None:
    if q.shape[-1] <= MAX_HEAD_DIM:
        return None
    return (
        f"memory_attention in Triton takes head_dim up to {MAX_HEAD_DIM}, not {q.shape[-1]}: "
        "use more heads, or set BMOJO_KERNELS=torch."
    )


def _group_limit(q: Tensor, k: Tensor, limit: int) -> str | None:
    """limit: rows of the tile that holds the query heads of a key/value head."""
    group = q.shape[-2] // k.shape[-2]
    if group <= limit:
        return None
    return (
        f"memory_attention in Triton takes up to {limit} query heads per key/value head, not {group}: "
        "use more key/value heads, or set BMOJO_KERNELS=torch."
    )


def _dtype_limit(sets: Iterable[Tensor | None], same: bool) -> str | None:
    """same: all of one dtype."""
    dtypes = {x.dtype for x in sets if x is not None}
    if dtypes.issubset(TOLERANCE) and (len(dtypes) == 1 or not same):
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        f"memory_attention in Triton takes bfloat16, float16 or float32{', one for all inputs' if same else ''}, not "
        f"{names}: convert them, or set BMOJO_KERNELS=torch."
    )


def _forward(inputs: FlatInputs) -> tuple[Tensor, Tensor]:
    """The attention, and the base-2 logarithm of its softmax's denominators [b, h, t]."""
    out, lse = _empty_outputs(inputs)
    for launch in plan_forward(_laid_out(inputs), out, lse, architecture(out.device)):
        launch.run()
    return out, lse


def _empty_outputs(inputs: FlatInputs) -> tuple[Tensor, Tensor]:
    return inputs.q.new_empty(inputs.q.shape), new_lse(inputs.q)


def _backward(inputs: FlatInputs, out: Tensor, lse: Tensor, grad_out: Tensor) -> SetGradients:
    lse = lse if is_tileable(lse) else new_lse(inputs.q).copy_(lse)
    saved, grads = Saved(out, lse, _tileable(grad_out), new_lse(inputs.q)), _empty_gradients(inputs)
    for launch in plan_backward(_laid_out(inputs), saved, grads, architecture(out.device)):
        launch.run()
    return grads


def _empty_gradients(inputs: FlatInputs) -> SetGradients:
    """Zeros for what only slots read: rows that are in none are not written."""

    def empty(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.new_zeros(x.shape) if name in ("eidetic_k", "eidetic_v") else x.new_empty(x.shape)

    # mypy cannot see that only the optional sets are None.
    return SetGradients(*map(empty, SetGradients._fields, inputs.sets))  # type: ignore[arg-type]  # None only where it may be


def _step(inputs: FlatStep) -> Tensor:
    out = inputs.q.new_empty(inputs.q.shape)
    for launch in plan_step(_laid_out(inputs), out, architecture(out.device)):
        launch.run()
    return out


attend = library_op(
    "memory_attention",
    FlatInputs,
    _forward,
    _empty_outputs,
    num_outputs=2,
    gradients=SetGradients._fields,
    backward=_backward,
    num_differentiable=1,
    keeps_outputs=True,
)
step = library_op("memory_attention_step", FlatStep, _step, lambda inputs: inputs.q.new_empty(inputs.q.shape))


def _run(inputs: AttentionInputs) -> Tensor:
    """Windows and chunks are cut to the rows there are, so that fewer sizes are compiled."""
    flat, rows = FlatInputs.of(inputs), inputs.k_bshp.shape[1]
    if flat.index_bjm is None:
        flat = flat._replace(chunk_size=flat.num_queries)
    out_bthp: Tensor = attend(*_padded(flat._replace(window_size=min(flat.window_size, rows))))[0]
    return out_bthp[..., : inputs.q_bthp.shape[-1]]


def _run_step(inputs: StepInputs) -> Tensor:
    out_bhp: Tensor = step(*_padded(FlatStep.of(inputs)))
    return out_bhp[..., : inputs.q_bhp.shape[-1]]


memory_attention = Path(_run, _refuses, TOLERANCE, strict=True)
memory_attention_step = Path(_run_step, _step_refuses, TOLERANCE, strict=True)


def _padded(inputs: Flat) -> Flat:
    """A head_dim that is not a power of two, or is below 16, filled up with zeros, which copies every tensor."""
    head_dim = inputs.q.shape[-1]
    padding = max(MIN_HEAD_DIM, 1 << (head_dim - 1).bit_length()) - head_dim
    if not padding:
        return inputs
    padded: dict[str, Any] = {name: F.pad(x, (0, padding)) for name, x in _sets(inputs).items()}
    return inputs._replace(**padded)


def _laid_out(inputs: Flat) -> Flat:
    """Queries, keys and values that tiles can be taken of; index, documents and positions side by side."""
    given = inputs._asdict()
    laid_out: dict[str, Any] = {name: _tileable(x) for name, x in _sets(inputs).items()}
    laid_out |= {name: given[name].contiguous() for name in _INTEGERS if given.get(name) is not None}
    return inputs._replace(**laid_out)


def _sets(inputs: Flat) -> dict[str, Tensor]:
    """Queries, keys and values that are there."""
    given = inputs._asdict()
    return {name: given[name] for name in SetGradients._fields if given[name] is not None}


def _tileable(x: Tensor) -> Tensor:
    """x, copied unless the channels of each head lie side by side and each row begins on a boundary of 16 bytes."""
    return x if is_tileable(x) else x.clone(memory_format=torch.contiguous_format)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at the sizes that `make kernel-report` compiles."""
    return [case for head_dim in (64, 128) for case in [*_report_case(arch, head_dim), step_case(arch, head_dim)]]


def _report_case(arch: str, head_dim: int) -> list[tuple[str, list[Launch]]]:
    batch, t, heads, kv_heads, window_size, chunk_size, num_slots = 8, 4096, 16, 4, 512, 256, 128
    q = torch.empty(batch, t, heads, head_dim, dtype=torch.bfloat16, device="meta")
    k = q[:, :, :kv_heads].contiguous()
    fading = k[:, window_size:].contiguous()
    index = torch.empty(batch, t // chunk_size, num_slots, dtype=torch.int64, device="meta")
    sets = (q, k, k, fading, fading, q, k, None)
    inputs = FlatInputs(*sets, index, None, window_size, chunk_size, 0, head_dim**-0.5)
    out, lse = _empty_outputs(inputs)
    saved, grads = Saved(out, lse, q, new_lse(q)), _empty_gradients(inputs)
    return [
        (f"forward, head_dim {head_dim}", plan_forward(inputs, out, lse, arch)),
        (f"backward, head_dim {head_dim}", plan_backward(inputs, saved, grads, arch)),
    ]
