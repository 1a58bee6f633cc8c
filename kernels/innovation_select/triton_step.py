"""The eidetic memory's decoding step in Triton: limits, and the one launch of a call."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.innovation_select.reference import EPS
from kernels.innovation_select.reference_step import LOWEST, StepInputs
from kernels.innovation_select.triton_decode import innovation_step_kernel
from kernels.operator import Path, library_op

# bfloat16: outputs and keys are moved as they are; scores are float32.
TOLERANCE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 2e-6)
MAX_TAPS = 16  # the loop over taps is unrolled
MAX_SORTED = 4096  # lanes one program sorts: exchanging their ranks takes 32 KiB of shared memory
MAX_CHANNELS = 16384  # one program holds a row and its taps
SLOTS_PER_COPY = 64

MUTATED = ("past_bkd", "log_e_br", "slot_k_bmhp", "slot_v_bmhp", "slot_log_e_bm", "slot_position_bm")
_RINGS = ("k_brhp", "v_brhp", "slot_k_bmhp", "slot_v_bmhp")


def _refuses(inputs: StepInputs) -> str | None:
    taps, sizes = inputs.weight_kd.shape[0], (inputs.slot_k_bmhp.shape[1] + inputs.chunk_size, inputs.y_bd.shape[1])
    for name in ("y_bd", *_RINGS):
        dtype = getattr(inputs, name).dtype
        if dtype not in TOLERANCE:
            return f"innovation_step in Triton takes bfloat16, float16 and float32, not {dtype}."
    if inputs.slot_log_e_bm.dtype != torch.float32 or inputs.log_e_br.dtype != torch.float32:
        return "innovation_step in Triton takes scores in float32."
    if inputs.k_brhp.dtype != inputs.slot_k_bmhp.dtype or inputs.v_brhp.dtype != inputs.slot_v_bmhp.dtype:
        return "innovation_step in Triton copies keys and values: rings and slots must have one dtype."
    if taps > MAX_TAPS or sizes[0] > MAX_SORTED or sizes[1] > MAX_CHANNELS:
        return (
            f"innovation_step in Triton takes at most {MAX_TAPS} taps, {MAX_SORTED} slots and positions of a chunk "
            f"together, and {MAX_CHANNELS} channels, not {taps}, {sizes[0]} and {sizes[1]}; use BMOJO_KERNELS=torch."
        )
    contiguous = all(getattr(inputs, name).is_contiguous() for name in MUTATED if name not in _RINGS)
    if not contiguous or any(getattr(inputs, name).stride(-1) != 1 for name in _RINGS):
        return "innovation_step updates its state in place: it must be laid out as EideticState.empty makes it."
    return None


def _empty_score(inputs: StepInputs) -> Tensor:
    return torch.empty(inputs.y_bd.shape[0], dtype=torch.float32, device=inputs.y_bd.device)


def plan(inputs: StepInputs, score_b: Tensor) -> Launch:
    """Write score_b and update the state."""
    tensors = dict(list(inputs._asdict().items())[:12]) | {"score_b": score_b}
    y_bd, weight_kd, tau = inputs.y_bd, inputs.weight_kd, inputs.tau
    num_slots, num_heads, head_dim = inputs.slot_k_bmhp.shape[1:]
    strides: dict[str, Any] = {
        f"{name.rpartition('_')[0]}_strides": getattr(inputs, name).stride()[:3] for name in _RINGS
    }
    lanes = _power_of_two(num_slots + inputs.chunk_size)
    return Launch(
        innovation_step_kernel,
        (y_bd.shape[0],),
        tensors
        | strides
        | {
            "num_channels": y_bd.shape[1],
            "y_stride_b": y_bd.stride(0),
            "weight_stride_k": weight_kd.stride(0),
            "weight_stride_d": weight_kd.stride(1) if weight_kd.shape[1] > 1 else 0,
            "num_heads": num_heads,
            "tau_bits": struct.unpack("<q", struct.pack("<d", tau or 1.0))[0],
            "eps": EPS,
            "lowest": LOWEST,
        },
        {
            "TAPS": weight_kd.shape[0],
            "RING": inputs.log_e_br.shape[1],
            "CHUNK": inputs.chunk_size,
            "SLOTS": num_slots,
            "P": head_dim,
            "BLOCK_D": _power_of_two(y_bd.shape[1]),
            "BLOCK_M": min(_power_of_two(num_slots), SLOTS_PER_COPY),
            "BLOCK_P": _power_of_two(head_dim),
            "LANES": lanes,
            "LOG_LANES": lanes.bit_length() - 1,
            "FORGETS": tau is not None,
        },
        num_warps=4,
        bytes=num_bytes(y_bd, weight_kd, inputs.past_bkd, inputs.past_bkd),
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _step(inputs: StepInputs) -> Tensor:
    score_b = _empty_score(inputs)
    plan(inputs, score_b).run()
    return score_b


step = library_op("innovation_step", StepInputs, _step, _empty_score, mutates=MUTATED)


def _run(inputs: StepInputs) -> Tensor:
    y_bd = inputs.y_bd if inputs.y_bd.stride(-1) == 1 else inputs.y_bd.contiguous()
    score_b: Tensor = step(*inputs._replace(y_bd=y_bd, position_b=inputs.position_b.contiguous()))
    return score_b


innovation_step = Path(_run, _refuses, TOLERANCE, strict=True)


def step_case() -> tuple[str, list[Launch]]:
    """The step that `make kernel-report` compiles: bf16, batch 8, d 2048, 4 taps, 4 heads, C 256, W 512, M 128."""
    y_bd = torch.empty(8, 2048, dtype=torch.bfloat16, device="meta")
    ring, slots = (y_bd.new_empty(8, 4, size, 128).transpose(1, 2) for size in (768, 128))
    log_e, slot_log_e = (torch.empty(8, size, device="meta") for size in (768, 128))
    slot_position = torch.empty(8, 128, dtype=torch.int64, device="meta")
    weight, past = torch.empty(4, 1, device="meta"), y_bd.new_empty(8, 4, 2048)
    state = (past, log_e, ring, ring, slots, slots, slot_log_e, slot_position)
    inputs = StepInputs(y_bd, slot_position[:, 0], weight, *state, None, 256, None)
    return "step", [plan(inputs, _empty_score(inputs))]
