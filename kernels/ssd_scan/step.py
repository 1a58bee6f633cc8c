"""One token of the recurrence in plain torch: what the reference and the torch path both do when decoding."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_step_torch(
    x_bhp: Tensor, dt_bh: Tensor, A_h: Tensor, B_bgn: Tensor, C_bgn: Tensor, D_h: Tensor, state_bhpn: Tensor
) -> Tensor:
    """See kernels.ssd_scan.ssd_step."""
    dtype, heads_a_group = state_bhpn.dtype, x_bhp.shape[1] // B_bgn.shape[1]
    B_bhn, C_bhn = (m.to(dtype).repeat_interleave(heads_a_group, 1) for m in (B_bgn, C_bgn))
    decay_bh = torch.exp(dt_bh * A_h).to(dtype)
    xdt_bhp = (x_bhp * dt_bh[..., None]).to(dtype)
    state_bhpn.mul_(decay_bh[..., None, None]).add_(xdt_bhp[..., None] * B_bhn[..., None, :])
    y_bhp = (state_bhpn @ C_bhn[..., None])[..., 0] + D_h[:, None] * x_bhp
    return y_bhp.to(x_bhp.dtype)
