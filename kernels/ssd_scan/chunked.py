"""Plain-torch SSD scan by state-space duality: matrix products inside chunks, a recurrence over chunk states between.

q: positions in a chunk, c: chunks, r: heads a group, e: all channels of a group (r x p). With a_k = dt_k A:

    decay[t, s]  = exp(sum of a over (s, t])   for s <= t, else 0       (also 0 between documents)
    reach[t]     = exp(sum of a over the chunk up to t)                 what the chunk's incoming state keeps
    y            = ((C B^T) * decay) (dt x)  +  reach * (C S^T)  +  D x
    S'           = reach[last] S + (decay[last] dt x)^T B

All exponents are sums over one interval, formed by a product with a triangle of ones: they are <= 0, so none overflows,
and carry no rounding from outside the interval, so documents stay apart to the last bit. README.md has the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


class SSDScan(torch.autograd.Function):
    """Arguments and results as in kernels.ssd_scan; inputs already in the precision of the computation."""

    @staticmethod
    def forward(
        ctx: Any,
        x_bthp: Tensor,
        dt_bth: Tensor,
        A_h: Tensor,
        B_btgn: Tensor,
        C_btgn: Tensor,
        D_h: Tensor,
        initial_bhpn: Tensor | None,
        doc_ids_bt: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sizes = Sizes.of(x_bthp, B_btgn)
        x, dt, B, C = (sizes.by_chunk(m) for m in (x_bthp, dt_bth, B_btgn, C_btgn))
        decay, reach = sizes.decays(dt, A_h, doc_ids_bt)
        xdt = x * dt[..., None]
        scores = torch.matmul(sizes.groups(C), sizes.groups(B).transpose(-1, -2))
        mixing = decay * sizes.each_head(scores)
        y = torch.matmul(mixing, xdt.transpose(2, 3)).transpose(2, 3).contiguous()

        to_end = decay[..., -1, :].transpose(-1, -2)
        write = torch.matmul(sizes.channels(xdt * to_end[..., None]).transpose(-1, -2), sizes.groups(B))
        states = torch.empty_like(write)  # [b, c, g, e, n]: before each chunk
        state = states.new_zeros(states[:, 0].shape)
        if initial_bhpn is not None:
            state = initial_bhpn.reshape(state.shape).to(state.dtype)
        carry = sizes.each_channel(reach[:, :, -1])
        for c in range(sizes.chunks):
            states[:, c] = state
            state = torch.addcmul(write[:, c], carry[:, c], state)
        across = torch.matmul(sizes.groups(C), states.transpose(-1, -2))
        y.addcmul_(sizes.heads(across), reach[..., None])
        y.addcmul_(x, D_h[:, None])
        ctx.save_for_backward(x, dt, A_h, B, C, D_h, decay, reach, states)
        ctx.sizes, ctx.with_initial = sizes, initial_bhpn is not None
        return sizes.by_time(y), state.reshape(sizes.batch, sizes.h, sizes.p, sizes.n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A_h, B, C, D_h, decay, reach, states = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        dy = sizes.by_chunk(grad_outputs[0])
        B_g, C_g = sizes.groups(B), sizes.groups(C)
        xdt = x * dt[..., None]

        # y's part from the incoming states, then the recurrence backwards
        dy_reach = sizes.channels(dy * reach[..., None])
        dC = torch.matmul(dy_reach, states)
        across = sizes.heads(torch.matmul(C_g, states.transpose(-1, -2)))
        dreach = (dy * across).sum(-1)
        dstates = torch.matmul(dy_reach.transpose(-1, -2), C_g)
        carry = sizes.each_channel(reach[:, :, -1])
        dwrite = torch.empty_like(dstates)
        dstate = grad_outputs[1].reshape(dwrite[:, 0].shape)
        for c in reversed(range(sizes.chunks)):
            dwrite[:, c] = dstate
            dstate = torch.addcmul(dstates[:, c], carry[:, c], dstate)
        dreach[:, :, -1] += (dwrite * states).view(*states.shape[:2], sizes.h, -1).sum(-1)

        # what each chunk writes into the state
        to_end = decay[..., -1, :].transpose(-1, -2)
        dB = torch.matmul(sizes.channels(xdt * to_end[..., None]), dwrite)
        dxdt_end = sizes.heads(torch.matmul(B_g, dwrite.transpose(-1, -2)))
        dto_end = (dxdt_end * xdt).sum(-1)
        dxdt = dxdt_end.mul_(to_end[..., None])

        # within chunks
        scores = sizes.each_head(torch.matmul(C_g, B_g.transpose(-1, -2)))
        dy_heads = dy.transpose(2, 3)
        dmixing = torch.matmul(dy_heads, xdt.transpose(2, 3).transpose(-1, -2))
        dxdt += torch.matmul((decay * scores).transpose(-1, -2), dy_heads).transpose(2, 3)
        dscores_heads = dmixing * decay
        ddecay_log = dscores_heads * scores  # gradient by the exponents
        ddecay_log[..., -1, :].addcmul_(dto_end.transpose(-1, -2), decay[..., -1, :])
        dscores = dscores_heads.unflatten(2, (sizes.g, -1)).sum(3)
        dC += torch.matmul(dscores, B_g)
        dB += torch.matmul(dscores.transpose(-1, -2), C_g)

        # exponents: a_k is in the interval (s, t] where s < k <= t
        upper = torch.ones(CHUNK, CHUNK, dtype=dt.dtype, device=dt.device).triu()
        from_k = torch.matmul(upper, ddecay_log)
        da = (from_k * upper.t().tril(-1)).sum(-1).transpose(-1, -2)
        da = da + torch.matmul(upper, dreach * reach)
        ddt = torch.addcmul((dxdt * x).sum(-1), da, A_h)
        dA = (da * dt).sum((0, 1, 2))
        dD = (dy * x).sum((0, 1, 2, 4))
        dx = dxdt.mul_(dt[..., None]).addcmul_(dy, D_h[:, None])
        dinitial = dstate.reshape(sizes.batch, sizes.h, sizes.p, sizes.n) if ctx.with_initial else None
        dB, dC = dB.transpose(2, 3), dC.transpose(2, 3)
        return sizes.by_time(dx), sizes.by_time(ddt), dA, sizes.by_time(dB), sizes.by_time(dC), dD, dinitial, None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call, and the layouts they give."""

    batch: int
    t: int
    h: int
    p: int
    g: int
    n: int

    @classmethod
    def of(cls, x_bthp: Tensor, B_btgn: Tensor) -> Sizes:
        return cls(*x_bthp.shape, *B_btgn.shape[2:])

    @property
    def chunks(self) -> int:
        return -(-self.t // CHUNK)

    def by_chunk(self, m: Tensor) -> Tensor:
        """[b, t, ...] to [b, c, q, ...], zero beyond t."""
        pad = -self.t % CHUNK
        if pad:
            m = F.pad(m, (0, 0) * (m.dim() - 2) + (0, pad))
        return m.unflatten(1, (self.chunks, CHUNK))

    def by_time(self, m: Tensor) -> Tensor:
        return m.flatten(1, 2)[:, : self.t]

    def groups(self, m_bcqgn: Tensor) -> Tensor:
        return m_bcqgn.transpose(2, 3)

    def channels(self, m_bcqhp: Tensor) -> Tensor:
        """[b, c, q, h, p] to [b, c, g, q, e]."""
        return m_bcqhp.unflatten(3, (self.g, -1)).flatten(4, 5).transpose(2, 3)

    def heads(self, m_bcgqe: Tensor) -> Tensor:
        """[b, c, g, q, e] to [b, c, q, h, p]."""
        return m_bcgqe.transpose(2, 3).unflatten(4, (-1, self.p)).flatten(3, 4)

    def each_head(self, m_bcgts: Tensor) -> Tensor:
        """[b, c, g, t, s] to [b, c, h, t, s]."""
        return m_bcgts if self.g == 1 else m_bcgts.repeat_interleave(self.h // self.g, 2)

    def each_channel(self, m_bch: Tensor) -> Tensor:
        """[b, c, h] to [b, c, g, e, 1]."""
        expanded = m_bch[..., None].expand(-1, -1, -1, self.p)
        return expanded.reshape(self.batch, self.chunks, self.g, -1, 1)

    def decays(self, dt_bcqh: Tensor, A_h: Tensor, doc_ids_bt: Tensor | None) -> tuple[Tensor, Tensor]:
        """decay [b, c, h, t, s] and reach [b, c, q, h] as defined above."""
        lower = torch.ones(CHUNK, CHUNK, dtype=dt_bcqh.dtype, device=dt_bcqh.device).tril()
        a_bchq = (dt_bcqh * A_h).transpose(2, 3)
        decay = torch.matmul(lower, a_bchq[..., None] * lower.tril(-1)).exp_()
        reach = torch.matmul(lower, dt_bcqh * A_h).exp_()
        if doc_ids_bt is None:
            return decay.mul_(lower), reach
        pad = doc_ids_bt[:, -1:].expand(-1, -self.t % CHUNK)
        docs_bcq = torch.cat([doc_ids_bt, pad], 1).unflatten(1, (self.chunks, CHUNK))
        same_bcts = (docs_bcq[..., :, None] == docs_bcq[..., None, :]).to(lower.dtype).mul_(lower)
        before_bc = torch.cat([docs_bcq[:, :1, 0], docs_bcq[:, :-1, -1]], 1)
        reach.mul_((docs_bcq == before_bc[..., None])[..., None])
        return decay.mul_(same_bcts[:, :, None]), reach


def ssd_scan_chunked(
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
    dtype = torch.promote_types(x_bthp.dtype, torch.float32)
    inputs = (m.to(dtype) for m in (x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h))
    initial = None if initial_bhpn is None else initial_bhpn.to(dtype)
    y_bthp, state_bhpn = SSDScan.apply(*inputs, initial, doc_ids_bt)
    return y_bthp.to(x_bthp.dtype), state_bhpn
