"""Rotations and ring writes of a decoding step in Triton: one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.memory_write.reference import WriteInputs
from kernels.memory_write.triton_kernels import memory_write_kernel
from kernels.operator import Path, library_op

# bfloat16: the interpreter cuts float32 to it (up to 2^-7), where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

RINGS = ("ring_k", "ring_v", "ring_plain", "ring_fading_k", "ring_fading_v")
ROWS = ("q", "k", "v", "fading_k", "fading_v")


class FlatWrite(NamedTuple):
    """WriteInputs for torch.library."""

    q: Tensor
    k: Tensor
    v: Tensor
    fading_k: Tensor | None
    fading_v: Tensor | None
    position: Tensor
    cos: Tensor
    sin: Tensor
    far_cos: Tensor | None
    far_sin: Tensor | None
    ring_k: Tensor
    ring_v: Tensor
    ring_plain: Tensor | None
    ring_fading_k: Tensor | None
    ring_fading_v: Tensor | None

    @classmethod
    def of(cls, inputs: WriteInputs) -> FlatWrite:
        q, k, v, position_b, near, far, rings, fading = inputs
        (fading_k, fading_v), (far_cos, far_sin) = fading or (None, None), far or (None, None)
        return cls(q, k, v, fading_k, fading_v, position_b, near[0], near[1], far_cos, far_sin, *rings)


def _refuses(inputs: WriteInputs) -> str | None:
    flat = FlatWrite.of(inputs)._asdict()
    for name in (*ROWS, *RINGS):
        x = flat[name]
        if x is not None and x.dtype not in TOLERANCE:
            return f"memory_write in Triton takes bfloat16, float16 and float32, not {x.dtype}."
        if name in RINGS and x is not None and x.stride(-1) != 1:
            return "memory_write updates rings in place: the channels of each head must lie side by side."
    return None


def _empty_output(inputs: FlatWrite) -> Tensor:
    q = inputs.q
    return torch.empty(1 if inputs.far_cos is None else 2, *q.shape, dtype=q.dtype, device=q.device)


def plan(inputs: FlatWrite, out: Tensor) -> Launch:
    """Write `out` and the rings."""
    given = inputs._asdict()
    b, heads, head_dim = inputs.q.shape
    strides: dict[str, Any] = {
        f"{name}_strides": None if given[name] is None else given[name].stride()[:-1] for name in (*ROWS, *RINGS)
    }
    fading = inputs.ring_fading_k
    return Launch(
        memory_write_kernel,
        (max(heads, inputs.k.shape[1]), b),
        {f"{name}_ptr": x for name, x in given.items()}
        | {"out_ptr": out, **strides, "far_out": out[0].numel(), "ring_size": inputs.ring_k.shape[1]}
        | {"fading_ring_size": 0 if fading is None else fading.shape[1]},
        {"HEADS": heads, "KV_HEADS": inputs.k.shape[1], "P": head_dim, "HALF": 1 << (head_dim // 2 - 1).bit_length()},
        num_warps=1,
        bytes=num_bytes(*inputs[:10], out) + num_bytes(*inputs[1:5], inputs.k),
    )


def _write(inputs: FlatWrite) -> Tensor:
    out = _empty_output(inputs)
    plan(inputs, out).run()
    return out


write = library_op("memory_write", FlatWrite, _write, _empty_output, mutates=RINGS)


def _run(inputs: WriteInputs) -> Tensor:
    flat = FlatWrite.of(inputs)
    given = flat._asdict()
    laid_out: dict[str, Any] = {
        name: given[name].contiguous()
        for name in ("position", "cos", "sin", "far_cos", "far_sin")
        if given[name] is not None
    }
    for name in ROWS:
        x = given[name]
        if x is not None and x.stride(-1) != 1:
            laid_out[name] = x.contiguous()
    out: Tensor = write(*flat._replace(**laid_out))
    return out


memory_write = Path(_run, _refuses, TOLERANCE, strict=True)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """The launch that `make kernel-report` compiles: bf16, batch 8, 16 heads, 4 key/value heads, W 512, C 256."""
    q, k = (torch.empty(8, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (16, 4))
    ring, fading = (q.new_empty(8, 4, size, 128).transpose(1, 2) for size in (768, 1024))
    position, cos = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, 64, device="meta")
    tables = (cos, cos, cos[0], cos[0])
    inputs = FlatWrite(q, k, k, k, k, position, *tables, ring, ring, ring, fading, fading)
    return [("step", [plan(inputs, _empty_output(inputs))])]
