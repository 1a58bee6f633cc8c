"""Plain-torch SSD scan by state-space duality: matrix products inside chunks, a recurrence over chunk states between.

q: positions in a chunk, c: chunks, r: heads per group, e: all channels of a group (r x p). With a_k = dt_k A:

    decay[t, s]  = exp(sum of a over (s, t])   for s <= t, else 0       (also 0 between documents)
    reach[t]     = exp(sum of a over the chunk up to t)                 what the chunk's incoming state keeps
    y            = ((C B^T) * decay) (dt x)  +  reach * (C S^T)  +  D x
    S'           = reach[last] S + (decay[last] dt x)^T B

All exponents are sums over one interval, formed by a product with a triangle of ones: they are <= 0, so none overflows,
and carry no rounding from outside the interval, so documents stay apart to the last bit. README.md has the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpp.constants import SSD_CHUNK
from kernels.operator import Path
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs, StepInputs, rates

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # sums over a chunk, and a recurrence that decays


class _SSDScan(torch.autograd.Function):
    """Of ScanInputs that are already in the precision of the computation."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, doc_ids_bt = inputs
        sizes = Sizes.of(x_bthp, B_btgn)
        x, dt, B, C = (sizes.by_chunk(m) for m in (x_bthp, dt_bth, B_btgn, C_btgn))
        B, C = B.transpose(2, 3), C.transpose(2, 3)
        decay, reach = sizes.decays(dt, A_h, doc_ids_bt)
        xdt = sizes.heads_first(x, dt)
        mixing = decay * sizes.each_head(torch.matmul(C, B.transpose(-1, -2)))
        within = torch.matmul(mixing, xdt)

        ends = torch.empty_like(x, memory_format=torch.contiguous_format)  # what is left of dt x at the chunk's end
        torch.mul(xdt.transpose(2, 3), decay[..., -1, :].transpose(2, 3)[..., None], out=ends)
        write = torch.matmul(sizes.channels(ends).transpose(-1, -2), B)
        first = write.new_zeros(write[:, 0].shape) if initial_bhpn is None else initial_bhpn.reshape(write[:, 0].shape)
        carry = sizes.each_channel(reach[:, :, -1])
        states = carried(first, write.unbind(1), carry.unbind(1))  # before each chunk, and after all
        across = sizes.heads(torch.matmul(C, states[:, :-1].transpose(-1, -2))).mul_(reach[..., None])
        y = torch.add(across, within.transpose(2, 3)).addcmul_(x, D_h[:, None])
        ctx.save_for_backward(x, dt, A_h, B, C, D_h, decay, reach, mixing, xdt, ends, across, states)
        ctx.sizes, ctx.with_initial = sizes, initial_bhpn is not None
        return sizes.by_time(y), states[:, -1].reshape(sizes.batch, sizes.h, sizes.p, sizes.n).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A_h, B, C, D_h, decay, reach, mixing, xdt, ends, across, states = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        dy, before = sizes.by_chunk(grad_outputs[0]), states[:, :-1]

        # y's part from the incoming states, then the recurrence backwards
        dy_reach = sizes.channels(dy * reach[..., None])
        dC = torch.matmul(dy_reach, before)
        dlog_reach = (dy * across).sum(-1)
        dbefore = torch.matmul(dy_reach.transpose(-1, -2), C)
        carry = sizes.each_channel(reach[:, :, -1])
        last = grad_outputs[1].reshape(dbefore[:, 0].shape)
        dstates = carried(last, dbefore.unbind(1), carry.unbind(1), backwards=True)
        dwrite = dstates[:, 1:]
        dcarry = (dwrite * before).view(*before.shape[:2], sizes.h, -1).sum(-1)
        dlog_reach[:, :, -1].addcmul_(dcarry, reach[:, :, -1])

        # what each chunk writes into the state
        dB = torch.matmul(sizes.channels(ends), dwrite)
        dends = sizes.heads(torch.matmul(B, dwrite.transpose(-1, -2)))
        dlog_end = (dends * ends).sum(-1)
        dxdt = dends.mul_(decay[..., -1, :].transpose(2, 3)[..., None])

        # within chunks
        dy_heads = dy.transpose(2, 3).contiguous()
        dmixing = torch.matmul(dy_heads, xdt.transpose(-1, -2))
        dxdt += torch.matmul(mixing.transpose(-1, -2), dy_heads).transpose(2, 3)
        dlog_decay = dmixing * mixing
        dlog_decay[..., -1, :] += dlog_end.transpose(2, 3)
        dscores = dmixing.mul_(decay).unflatten(2, (sizes.g, -1)).sum(3)
        dC += torch.matmul(dscores, B)
        dB += torch.matmul(dscores.transpose(-1, -2), C)

        # exponents: a_k is in the interval (s, t] where s < k <= t
        lower = torch.ones(SSD_CHUNK, SSD_CHUNK, dtype=dt.dtype, device=dt.device).tril()
        over_s = torch.matmul(dlog_decay, lower.t().triu(1))  # [t, k]
        da_bchq = over_s.mul_(lower).sum(-2) + torch.matmul(dlog_reach.transpose(2, 3), lower)
        da = da_bchq.transpose(2, 3)
        ddt = torch.addcmul((dxdt * x).sum(-1), da, A_h)
        dA = (da * dt).sum((0, 1, 2))
        dD = (dy * x).sum((0, 1, 2, 4))
        dx = dxdt.mul_(dt[..., None]).addcmul_(dy, D_h[:, None])
        dinitial = dstates[:, 0].reshape(sizes.batch, sizes.h, sizes.p, sizes.n) if ctx.with_initial else None
        dB, dC = dB.transpose(2, 3), dC.transpose(2, 3)
        return sizes.by_time(dx), sizes.by_time(ddt), dA, sizes.by_time(dB), sizes.by_time(dC), dD, dinitial, None


def carried(first: Tensor, write: Sequence[Tensor], carry: Sequence[Tensor], backwards: bool = False) -> Tensor:
    """[b, c + 1, ...]: `first`, and S <- write + carry S after each of c steps; backwards: the last step first."""
    way = -1 if backwards else 1
    steps = list(zip(write, carry, strict=True))[::way]
    if torch.compiler.is_compiling():  # which does not follow results written into strided views
        states = [first]
        for write_c, carry_c in steps:
            states.append(torch.addcmul(write_c, carry_c, states[-1]))
        return torch.stack(states[::way], 1)
    found = first.new_empty(first.shape[0], len(steps) + 1, *first.shape[1:])
    at = found.unbind(1)[::way]
    at[0].copy_(first)
    for (write_c, carry_c), before, after in zip(steps, at, at[1:], strict=False):
        torch.addcmul(write_c, carry_c, before, out=after)
    return found


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
        return -(-self.t // SSD_CHUNK)

    def by_chunk(self, m: Tensor) -> Tensor:
        """[b, t, ...] to [b, c, q, ...], zero beyond t."""
        pad = -self.t % SSD_CHUNK
        if pad:
            m = F.pad(m, (0, 0) * (m.dim() - 2) + (0, pad))
        return m.unflatten(1, (self.chunks, SSD_CHUNK))

    def by_time(self, m: Tensor) -> Tensor:
        return m.flatten(1, 2)[:, : self.t]

    def heads_first(self, x_bcqhp: Tensor, scale_bcqh: Tensor) -> Tensor:
        """scale * x as [b, c, h, q, p]."""
        scaled = x_bcqhp.new_empty(self.batch, self.chunks, self.h, SSD_CHUNK, self.p)
        return torch.mul(x_bcqhp.transpose(2, 3), scale_bcqh.transpose(2, 3)[..., None], out=scaled)

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
        lower = torch.ones(SSD_CHUNK, SSD_CHUNK, dtype=dt_bcqh.dtype, device=dt_bcqh.device).tril()
        a_bchq = (dt_bcqh * A_h).transpose(2, 3)
        decay = torch.matmul(a_bchq[..., None, :] * lower, lower.tril(-1)).exp_()
        reach = torch.matmul(a_bchq, lower.t()).exp_().transpose(2, 3)
        if doc_ids_bt is None:
            return decay.mul_(lower), reach
        pad = doc_ids_bt[:, -1:].expand(-1, -self.t % SSD_CHUNK)
        docs_bcq = torch.cat([doc_ids_bt, pad], 1).unflatten(1, (self.chunks, SSD_CHUNK))
        same_bcts = (docs_bcq[..., :, None] == docs_bcq[..., None, :]).to(lower.dtype).mul_(lower)
        before_bc = torch.cat([docs_bcq[:, :1, 0], docs_bcq[:, :-1, -1]], 1)
        reach.mul_((docs_bcq == before_bc[..., None])[..., None])
        return decay.mul_(same_bcts[:, :, None]), reach


def _run(inputs: ScanInputs) -> ScanOutputs:
    dtype = torch.promote_types(inputs.x_bthp.dtype, torch.float32)
    precise = (None if m is None else m.to(dtype) for m in inputs[:-1])
    y_bthp, state_bhpn = _SSDScan.apply(*precise, inputs.doc_ids_bt)
    return ScanOutputs(y_bthp.to(inputs.x_bthp.dtype), state_bhpn)


def _run_step(inputs: StepInputs) -> Tensor:
    x_bhp, _, _, _, B_bgn, C_bgn, D_h, state_bhpn = inputs
    dt_bh, A_h = rates(inputs)
    dtype, heads_per_group = state_bhpn.dtype, x_bhp.shape[1] // B_bgn.shape[1]
    B_bhn, C_bhn = (m.to(dtype).repeat_interleave(heads_per_group, 1) for m in (B_bgn, C_bgn))
    decay_bh = torch.exp(dt_bh * A_h).to(dtype)
    xdt_bhp = (x_bhp * dt_bh[..., None]).to(dtype)
    state_bhpn.mul_(decay_bh[..., None, None]).add_(xdt_bhp[..., None] * B_bhn[..., None, :])
    y_bhp = (state_bhpn @ C_bhn[..., None])[..., 0] + D_h[:, None] * x_bhp
    return y_bhp.to(x_bhp.dtype)


ssd_scan = Path(_run, tolerance=TOLERANCE)
ssd_step = Path(_run_step, tolerance=TOLERANCE)
