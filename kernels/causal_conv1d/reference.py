"""The meaning of the causal convolution: each output from its own position and the width - 1 before it, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_reference(
    x_btd: Tensor, weight_dk: Tensor, initial_btd: Tensor | None = None, doc_ids_bt: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See kernels.causal_conv1d."""
    t, width = x_btd.shape[1], weight_dk.shape[1]
    if initial_btd is None:
        initial_btd = x_btd.new_zeros(x_btd.shape[0], width - 1, x_btd.shape[2])
    extended = torch.cat([initial_btd.to(x_btd.dtype), x_btd], 1)
    outputs = []
    for i in range(t):
        total = torch.zeros_like(x_btd[:, 0])
        for lag in range(min(width, i + width)):
            tap = extended[:, i + width - 1 - lag] * weight_dk[:, width - 1 - lag].to(x_btd.dtype)
            if doc_ids_bt is not None:
                same = i >= lag and doc_ids_bt[:, i] == doc_ids_bt[:, i - lag]
                tap = tap * torch.as_tensor(same, device=tap.device).to(tap.dtype).reshape(-1, 1)
            total = total + tap
        outputs.append(F.silu(total))
    return torch.stack(outputs, 1), extended[:, t:].detach()
