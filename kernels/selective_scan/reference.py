"""The meaning of the selective scan: the recurrence of Mamba (arXiv:2312.00752, equation 2a), one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    x_bti: Tensor,
    dt_bti: Tensor,
    A_in: Tensor,
    B_btn: Tensor,
    C_btn: Tensor,
    D_i: Tensor,
    initial_bin: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.selective_scan."""
    dtype = torch.promote_types(x_bti.dtype, torch.float32)
    x, dt, A, B, C, D = (m.to(dtype) for m in (x_bti, dt_bti, A_in, B_btn, C_btn, D_i))
    state = x.new_zeros(x.shape[0], *A.shape) if initial_bin is None else initial_bin.to(dtype)
    outputs = []
    for i in range(x.shape[1]):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None]
        write_bin = (dt[:, i] * x[:, i])[..., None] * B[:, i, None, :]
        state = torch.exp(dt[:, i, :, None] * A) * state + write_bin
        outputs.append(torch.einsum("bin,bn->bi", state, C[:, i]) + D * x[:, i])
    return torch.stack(outputs, 1).to(x_bti.dtype), state
