"""The meaning of the SSD scan: the recurrence of Mamba-2 (arXiv:2405.21060, equation 1), one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_scan_reference(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.ssd_scan."""
    b, t, h, p = x_bthp.shape
    dtype = torch.float64 if x_bthp.dtype == torch.float64 else torch.float32
    x, dt, A, D = x_bthp.to(dtype), dt_bth.to(dtype), A_h.to(dtype), D_h.to(dtype)
    B, C = (m.to(dtype).repeat_interleave(h // m.shape[2], 2) for m in (B_btgn, C_btgn))
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_bhpn is None else initial_bhpn.to(dtype)
    outputs = []
    for i in range(t):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None, None]
        decay_bh = torch.exp(dt[:, i] * A)
        write_bhpn = torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i], B[:, i])
        state = decay_bh[..., None, None] * state + write_bhpn
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, i]) + D[:, None] * x[:, i])
    return torch.stack(outputs, 1).to(x_bthp.dtype), state
