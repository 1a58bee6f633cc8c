"""The rotations of `pointwise`, and indexed writes: without a look at positions, which would wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.memory_write.reference import WriteInputs
from kernels.operator import Path
from kernels.pointwise import rotate, rotate_both

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _run(inputs: WriteInputs) -> Tensor:
    q_bhp, k_bhp, v_bhp, position_b, near, far, rings, fading = inputs
    batch = torch.arange(position_b.shape[0], device=position_b.device)
    slot_b = position_b % rings.window_k.shape[1]
    rings.window_k[batch, slot_b] = rotate(k_bhp, *near).to(rings.window_k.dtype)
    rings.window_v[batch, slot_b] = v_bhp.to(rings.window_v.dtype)
    if rings.plain_k is not None:
        rings.plain_k[batch, slot_b] = k_bhp.to(rings.plain_k.dtype)
    if fading is not None and rings.fading_k is not None and rings.fading_v is not None:
        slot_b = position_b % rings.fading_k.shape[1]
        rings.fading_k[batch, slot_b] = rotate(fading[0], *near).to(rings.fading_k.dtype)
        rings.fading_v[batch, slot_b] = fading[1].to(rings.fading_v.dtype)
    return rotate(q_bhp, *near)[None] if far is None else torch.stack(rotate_both(q_bhp, near, far))


memory_write = Path(_run, tolerance=TOLERANCE)
