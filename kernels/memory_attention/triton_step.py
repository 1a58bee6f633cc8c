"""Launches of one decoding step of memory attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import INTERPRETER, Config, choose
from kernels.memory_attention.reference import StepInputs
from kernels.memory_attention.triton_decode import combine_kernel, step_kernel
from kernels.memory_attention.triton_plan import LOG2_E, strided

MIN_ROWS, MAX_ROWS = 16, 128  # of a matrix product
ENOUGH_PROGRAMS = 512  # a few for each multiprocessor of a large GPU
MAX_SPLITS = 32
_ONE = (Config({"BLOCK_K": 64}, num_warps=4, num_stages=2),)
CONFIGS = {
    "sm_80": _ONE,
    "sm_90": _ONE,
    "sm_100": _ONE,
    "gfx942": (Config({"BLOCK_K": 64}, num_warps=4, num_stages=1),),
    INTERPRETER: (Config({"BLOCK_K": 16}),),
}


class FlatStep(NamedTuple):
    """StepInputs for torch.library: tensors first, sets that are absent as None. scale: of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    fading_k: Tensor | None
    fading_v: Tensor | None
    eidetic_q: Tensor | None
    eidetic_k: Tensor | None
    eidetic_v: Tensor | None
    slot_position: Tensor | None
    position: Tensor
    window_size: int
    scale: float

    @classmethod
    def of(cls, inputs: StepInputs) -> FlatStep:
        q, k, v, position_b, fading, eidetic, window_size = inputs
        fading_k, fading_v = fading or (None, None)
        eidetic_q, eidetic_k, eidetic_v, slot_position = eidetic or (None,) * 4
        sets = (q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v)
        return cls(*sets, slot_position, position_b, window_size or k.shape[1], q.shape[-1] ** -0.5)

    @property
    def sets(self) -> tuple[Tensor | None, ...]:
        """Queries, keys and values."""
        return self[:8]


def plan_step(inputs: FlatStep, out: Tensor, arch: str) -> list[Launch]:
    """Write out [b, h, p]."""
    q, k, fading_k, slot_position = inputs.q, inputs.k, inputs.fading_k, inputs.slot_position
    group, head_dim = q.shape[1] // k.shape[2], q.shape[2]
    sizes = [x.shape[1] for x in (k, fading_k, slot_position) if x is not None]
    args = strided(**dict(zip(FlatStep._fields, inputs.sets, strict=False))) | {
        "slot_position_ptr": slot_position,
        "position_ptr": inputs.position,
        "num_heads": q.shape[1],
        "window_size": inputs.window_size,
        "ring_size": k.shape[1],
        "fading_ring_size": 0 if fading_k is None else fading_k.shape[1],
        "scale_log2": inputs.scale * LOG2_E,
    }

    def plan(config: Config) -> list[Launch]:
        splits = _num_splits(sum(-(-size // config.tiles["BLOCK_K"]) for size in sizes), q.shape[0] * k.shape[2])
        parts: dict[str, Tensor | None] = dict.fromkeys(("part_out_ptr", "part_max_ptr", "part_sum_ptr"))
        if splits > 1:
            shape = *q.shape[:2], splits
            parts["part_out_ptr"] = q.new_empty(*shape, head_dim, dtype=torch.float32)
            parts |= {name: q.new_empty(shape, dtype=torch.float32) for name in ("part_max_ptr", "part_sum_ptr")}
        constants = {
            "NUM_SLOTS": 0 if slot_position is None else slot_position.shape[1],
            "GROUP": group,
            "P": head_dim,
            "ROWS": max(MIN_ROWS, 1 << (group - 1).bit_length()),
            "SPLITS": splits,
            **config.tiles,
        }
        attend = Launch(
            step_kernel,
            (splits, k.shape[2], q.shape[0]),
            args | parts | {"out_ptr": out},
            constants,
            config.num_warps,
            config.num_stages,
            flops=4 * q.numel() * sum(sizes),
            bytes=num_bytes(*inputs.sets, slot_position, inputs.position, *parts.values()),
        )
        if splits == 1:
            return [attend]
        combine = Launch(
            combine_kernel,
            (q.shape[0] * q.shape[1],),
            {**parts, "out_ptr": out},
            {"SPLITS": splits, "P": head_dim},
            num_warps=1,
            bytes=num_bytes(*parts.values(), out),
        )
        return [attend, combine]

    return plan(choose("memory_attention.step", arch, CONFIGS[arch], (q.dtype, k.dtype, head_dim, group), plan))


def _num_splits(num_tiles: int, programs_per_split: int) -> int:
    """A power of two: enough programs to fill a GPU, and two tiles or more for each."""
    most = max(1, min(MAX_SPLITS, num_tiles // 2, ENOUGH_PROGRAMS // programs_per_split))
    return 1 << (most.bit_length() - 1)


def step_case(arch: str, head_dim: int) -> tuple[str, list[Launch]]:
    """The decoding step that `make kernel-report` compiles."""
    batch, heads, kv_heads, window_size, chunk_size, num_slots = 8, 16, 4, 512, 256, 128
    q = torch.empty(batch, heads, head_dim, dtype=torch.bfloat16, device="meta")
    ring, fading, slots = (
        q.new_empty(batch, kv_heads, size, head_dim).transpose(1, 2)
        for size in (window_size + chunk_size, 2 * window_size, num_slots)
    )
    slot_position = torch.empty(batch, num_slots, dtype=torch.int64, device="meta")
    sets = (q, ring, ring, fading, fading, q, slots, slots)
    inputs = FlatStep(*sets, slot_position, slot_position[:, 0], window_size, head_dim**-0.5)
    return f"decoding step, head_dim {head_dim}", plan_step(inputs, q, arch)
