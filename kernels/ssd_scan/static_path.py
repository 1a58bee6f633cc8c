"""The SSD scan from matrix products alone: those of torch_path.py inside chunks, and one triangle over chunks.

The recurrence S' = carry S + write over chunks is a product with a triangle too: the state after chunk j is the sum
over i <= j of exp(sum of a over the chunks (i, j]) write_i. So there is no loop, and no state waits for another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp.constants import SSD_CHUNK
from kernels.operator import Path
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs
from kernels.ssd_scan.torch_path import TOLERANCE, Sizes
from kernels.static import intervals, lower_triangle, padded, parts

# b batch, c and j chunks, q, t and s positions in a chunk, h heads, p channels, n states; g groups, e channels of one


def _run(inputs: ScanInputs) -> ScanOutputs:
    dtype = torch.promote_types(inputs.x_bthp.dtype, torch.float32)
    x, dt, A, B, C, D = (m.to(dtype) for m in inputs[:6])
    sizes, docs = Sizes.of(x, B), inputs.doc_ids_bt
    docs_bcq = None if docs is None else _documents_by_chunk(sizes, docs)
    xdt_bcqhp = sizes.by_chunk(x * dt[..., None])
    B_bcgqn, C_bcgqn = (sizes.by_chunk(m).transpose(2, 3) for m in (B, C))
    a_bchq = sizes.by_chunk(dt * A).transpose(2, 3)
    decay_bchts, reach_bcqh = _decays(a_bchq, docs_bcq)

    scores_bcgts = torch.matmul(C_bcgqn, B_bcgqn.transpose(-1, -2))
    mixing_bchts = _each_head(sizes, scores_bcgts) * decay_bchts
    within_bchqp = torch.matmul(mixing_bchts, xdt_bcqhp.transpose(2, 3))
    to_end_bcqh = decay_bchts[..., SSD_CHUNK - 1, :].transpose(2, 3)
    ends_bcgqe = sizes.channels(xdt_bcqhp * to_end_bcqh[..., None])
    write_bcgen = torch.matmul(ends_bcgqe.transpose(-1, -2), B_bcgqn)
    states = _states(sizes, write_bcgen, a_bchq.sum(-1), docs_bcq, inputs.initial_bhpn)
    before, after = parts(states, (sizes.chunks, 1), 1)
    across_bcgqe = torch.matmul(C_bcgqn, before.reshape(write_bcgen.shape).transpose(-1, -2))
    y_bcqhp = within_bchqp.transpose(2, 3) + sizes.heads(across_bcgqe) * reach_bcqh[..., None]
    y_bthp = padded(y_bcqhp.flatten(1, 2), 0, sizes.t - sizes.chunks * SSD_CHUNK) + D[:, None] * x
    return ScanOutputs(y_bthp.to(inputs.x_bthp.dtype), after[:, 0])


def _decays(a_bchq: Tensor, docs_bcq: Tensor | None) -> tuple[Tensor, Tensor]:
    """decay [b, c, h, t, s] and reach [b, c, q, h] as torch_path.py defines them."""
    lower = lower_triangle(SSD_CHUNK, a_bchq)
    decay_bchts = torch.exp(intervals(a_bchq)) * lower
    reach_bcqh = torch.exp(torch.matmul(a_bchq, lower.t())).transpose(2, 3)
    if docs_bcq is None:
        return decay_bchts, reach_bcqh
    same_bcts = (docs_bcq[..., :, None] == docs_bcq[..., None, :]).to(lower.dtype)
    before_bc = torch.cat([docs_bcq[:, :1, 0], docs_bcq[:, :-1, SSD_CHUNK - 1]], 1)
    continues_bcq = (docs_bcq == before_bc[..., None]).to(lower.dtype)
    return decay_bchts * same_bcts[:, :, None], reach_bcqh * continues_bcq[..., None]


def _states(
    sizes: Sizes, write_bcgen: Tensor, total_bch: Tensor, docs_bcq: Tensor | None, initial_bhpn: Tensor | None
) -> Tensor:
    """The state before each chunk, and after all: [b, c + 1, h, p, n]. The initial one is as if written before them."""
    total_bhj = padded(total_bch, 1, 0).transpose(1, 2)
    carry_bhji = torch.exp(intervals(total_bhj)) * lower_triangle(sizes.chunks + 1, total_bhj)
    if docs_bcq is not None:
        first, last = docs_bcq[:, :1, 0], docs_bcq[:, :, SSD_CHUNK - 1]
        ends_bj = torch.cat([first, last], 1)
        breaks_bj = (ends_bj != torch.cat([first, first, last[:, :-1]], 1)).to(total_bhj.dtype)
        carry_bhji = carry_bhji * (intervals(breaks_bj) == 0).to(total_bhj.dtype)[:, None]
    write_bchs = write_bcgen.reshape(sizes.batch, sizes.chunks, sizes.h, sizes.p * sizes.n)
    if initial_bhpn is None:
        first_b1hs = torch.zeros_like(write_bchs[:, :1])
    else:
        first_b1hs = initial_bhpn.to(write_bchs.dtype).flatten(2)[:, None]
    states_bhjs = torch.matmul(carry_bhji, torch.cat([first_b1hs, write_bchs], 1).transpose(1, 2))
    return states_bhjs.unflatten(3, (sizes.p, sizes.n)).transpose(1, 2)


def _each_head(sizes: Sizes, m_bcgts: Tensor) -> Tensor:
    """[b, c, g, t, s] to [b, c, h, t, s]."""
    if sizes.g == 1:
        return m_bcgts
    return m_bcgts[:, :, :, None].expand(-1, -1, -1, sizes.h // sizes.g, -1, -1).flatten(2, 3)


def _documents_by_chunk(sizes: Sizes, doc_ids_bt: Tensor) -> Tensor:
    last = doc_ids_bt[:, sizes.t - 1 :].expand(-1, -sizes.t % SSD_CHUNK)
    return torch.cat([doc_ids_bt, last], 1).unflatten(1, (sizes.chunks, SSD_CHUNK))


ssd_scan = Path(_run, tolerance=TOLERANCE)
