"""The launch of one token of the SSD scan."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.ssd_scan.reference import StepInputs
from kernels.ssd_scan.triton_decode import ssd_step_kernel


class StepPlan(NamedTuple):
    """A launch, and the tensor it leaves y in."""

    launch: Launch
    y_bhp: Tensor


def plan_step(inputs: StepInputs) -> StepPlan:
    """Heads and channels of a row lie side by side; rows may be parts of a wider projection."""
    x, dt, dt_bias, A_log, B, C, D, state = inputs
    b, h, p = x.shape
    g, n = B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = {"x": x, "dt": dt, "dt_bias": dt_bias, "A_log": A_log, "B": B, "C": C, "D": D, "state": state, "y": y}
    launch = Launch(
        ssd_step_kernel,
        (triton.cdiv(p, 16), h, b),  # 16 channels: 8 KiB of a state of 128, and 2 048 programs from batch 16 on
        {f"{name}_ptr": tensor for name, tensor in tensors.items()}
        | {f"{name}_stride_b": tensors[name].stride(0) for name in ("x", "dt", "B", "C")}
        | {"h": h, "heads_per_group": h // g},
        {"P": p, "N": n, "BLOCK_P": 16, "BLOCK_N": max(16, triton.next_power_of_2(n))},
        bytes=num_bytes(*tensors.values(), state),
    )
    return StepPlan(launch, y)


def step_case(d_state: int) -> tuple[str, list[Launch]]:
    """The step that `make kernel-report` compiles: bf16, batch 8, 32 heads of 64 channels, one group."""
    x = torch.empty(8, 32, 64, dtype=torch.bfloat16, device="meta")
    state = torch.empty(8, 32, 64, d_state, device="meta")
    B, A_log = x.new_empty(8, 1, d_state), state[0, :, 0, 0].contiguous()
    inputs = StepInputs(x, x[..., 0].contiguous(), A_log, A_log, B, B, A_log, state)
    return f"step, d_state {d_state}", [plan_step(inputs).launch]
