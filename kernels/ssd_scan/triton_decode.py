"""Device code of one token of the SSD scan."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)). 1 + e is rounded, so the logarithm is scaled by what e became."""
    e = tl.exp(-tl.abs(x))
    above = (1.0 + e) - 1.0
    return tl.maximum(x, 0.0) + tl.where(above == 0.0, e, tl.log(1.0 + e) * (e / above))


@triton.jit
def ssd_step_kernel(
    x_ptr,  # [b, h, P]
    dt_ptr,  # [b, h]
    dt_bias_ptr,
    A_log_ptr,
    B_ptr,  # [b, g, N]
    C_ptr,
    D_ptr,
    state_ptr,  # [b, h, P, N]: read and overwritten
    y_ptr,  # [b, h, P]
    x_stride_b,
    dt_stride_b,
    B_stride_b,
    C_stride_b,
    h,
    heads_per_group,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token: some of a head's channels, all of their states."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_state = (p < P)[:, None] & (n < N)[None, :]
    states = state_ptr + ((batch * h + head) * P + p[:, None]) * N + n[None, :]
    state = tl.load(states, mask=in_state, other=0.0)
    x = tl.load(x_ptr + batch * x_stride_b + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + batch * B_stride_b + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_stride_b + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    raw = tl.load(dt_ptr + batch * dt_stride_b + head).to(tl.float32) + tl.load(dt_bias_ptr + head)
    dt = softplus(raw)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log_ptr + head)))
    state = decay * state + (x * dt)[:, None] * B[None, :]
    tl.store(states, state, mask=in_state)
    y = tl.sum(state * C[None, :], 1) + tl.load(D_ptr + head) * x
    tl.store(y_ptr + (batch * h + head) * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
