"""The meaning of the gated delta rule: its recurrence (arXiv:2412.06464, equation 10), one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q_bthn: Tensor,
    k_bthn: Tensor,
    v_bthp: Tensor,
    log_decay_bth: Tensor,
    beta_bth: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.gated_delta_rule."""
    b, t, h, p = v_bthp.shape
    dtype = torch.promote_types(v_bthp.dtype, torch.float32)
    q, k, v, log_decay, beta = (m.to(dtype) for m in (q_bthn, k_bthn, v_bthp, log_decay_bth, beta_bth))
    identity_nn = torch.eye(q.shape[-1], dtype=dtype, device=q.device)
    state = v.new_zeros(b, h, p, q.shape[-1]) if initial_bhpn is None else initial_bhpn.to(dtype)
    outputs = []
    for i in range(t):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None, None]
        beta_bh11 = beta[:, i, :, None, None]
        erase_bhnn = identity_nn - beta_bh11 * k[:, i, :, :, None] * k[:, i, :, None, :]
        write_bhpn = beta_bh11 * v[:, i, :, :, None] * k[:, i, :, None, :]
        state = torch.exp(log_decay[:, i])[..., None, None] * state @ erase_bhnn + write_bhpn
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, i]))
    return torch.stack(outputs, 1).to(v_bthp.dtype), state
