"""Plain-torch delta rule with a decay per channel: matrix products inside chunks, a recurrence over states between.

c: chunks, l: positions in a chunk. Rows of Q, K, V are the positions of a chunk; S is the state before it. g is log a.

    reach[t]   = exp(sum of g over the chunk up to t)      what each channel of S keeps at t
    to_end[s]  = exp(sum of g after s)                     what each channel of k_s keeps at the end of the chunk
    qk[t, s]   = sum over n of q_t k_s exp(sum of g over (s, t])   for s <= t, else 0    (also 0 between documents)
    L          = beta * kk below the diagonal              kk as qk, with k_t for q_t
    U          = (I + L)^-1 beta (V - (reach * K) S^T)     what each position writes
    y          = (reach * Q) S^T + qk U
    S'         = reach[last] * S + U^T (to_end * K)

README.md has the derivation, and how qk and kk are made with exponents <= 0 only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.channel_delta_rule.reference import DeltaInputs, StepInputs
from kernels.gated_delta_rule.reference import DeltaOutputs
from kernels.gated_delta_rule.torch_path import Solve, by_chunk, chunks_of_documents, inverse_flops, step
from kernels.operator import Path

CHUNK = 64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


class Products(NamedTuple):
    """What a chunk computes of its own queries, keys and decays."""

    qk: Tensor  # [b, c, h, t, s], zero for s > t
    kk: Tensor
    reach: Tensor  # [b, c, h, l, n]
    to_end: Tensor


def chunked(inputs: DeltaInputs, chunk_size: int) -> DeltaOutputs:
    """chunk_size: a power of two."""
    dtype, t = torch.promote_types(inputs.v_bthp.dtype, torch.float32), inputs.v_bthp.shape[1]
    q, k, v, log_decay, beta = (by_chunk(m.to(dtype), chunk_size) for m in inputs[:5])
    made = within_documents(products(q, k, log_decay), inputs.doc_ids_bt, chunk_size)
    lower = beta[..., None] * made.kk.tril(-1)
    scaled = torch.cat([v, k * made.reach], -1) * beta[..., None]
    u_fresh, u_per_state = Solve.apply(lower, scaled).split([v.shape[-1], k.shape[-1]], -1)

    zeros = v.new_zeros(v[:, 0, :, 0].shape + k.shape[-1:])
    state = zeros if inputs.initial_bhpn is None else inputs.initial_bhpn.to(dtype)
    states, written = [], []
    k_end, carry = k * made.to_end, made.reach[..., -1:, :]
    for fresh, per_state, k_c, carry_c in zip(
        *(m.unbind(1) for m in (u_fresh, u_per_state, k_end, carry)), strict=True
    ):
        states.append(state)
        written.append(fresh - torch.matmul(per_state, state.transpose(-1, -2)))
        state = carry_c * state + torch.matmul(written[-1].transpose(-1, -2), k_c)
    across = torch.matmul(q * made.reach, torch.stack(states, 1).transpose(-1, -2))
    y = across + torch.matmul(made.qk, torch.stack(written, 1))
    return DeltaOutputs(y.transpose(2, 3).flatten(1, 2)[:, :t].to(inputs.v_bthp.dtype), state)


def products(q_bchln: Tensor, k_bchln: Tensor, log_decay_bchln: Tensor) -> Products:
    """Products of one document, from blocks that double in size. A pair of positions meets at the middle between two.

    A block of size 1 is q_t k_t. Of two neighbours, the later one's rows read the earlier one's through

        exp(sum of g over (middle, t]) * q_t        exp(sum of g over (s, middle]) * k_s

    whose exponents are sums of terms <= 0. `up_to` and `after` hold these sums for each block as it grows.
    """
    up_to, after = (m.unsqueeze(-2) for m in (log_decay_bchln, torch.zeros_like(log_decay_bchln)))
    rows = torch.stack([q_bchln, k_bchln])
    blocks = (rows * k_bchln).sum(-1)[..., None, None]  # [2, b, c, h, block, row, column]
    while (size := blocks.shape[-1]) < q_bchln.shape[-2]:
        first_up_to, later_up_to = up_to.unflatten(-3, (-1, 2)).unbind(-3)
        first_after, later_after = after.unflatten(-3, (-1, 2)).unbind(-3)
        reading = rows.unflatten(-2, (-1, 2, size))[..., 1, :, :] * torch.exp(later_up_to)
        read = k_bchln.unflatten(-2, (-1, 2, size))[..., 0, :, :] * torch.exp(first_after)
        first, later = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        corner = torch.matmul(reading, read.transpose(-1, -2))
        top = torch.cat([first, torch.zeros_like(first)], -1)
        blocks = torch.cat([top, torch.cat([corner, later], -1)], -2)
        up_to = torch.cat([first_up_to, first_up_to[..., -1:, :] + later_up_to], -2)
        after = torch.cat([first_after + later_up_to[..., -1:, :], later_after], -2)
    qk, kk = blocks.squeeze(-3)
    return Products(qk, kk, torch.exp(up_to.squeeze(-3)), torch.exp(after.squeeze(-3)))


def within_documents(made: Products, doc_ids_bt: Tensor | None, size: int) -> Products:
    """Zero where a position and the one it reads, or the state before or after the chunk, are of two documents."""
    if doc_ids_bt is None:
        return made
    docs_bcl, before_bc1 = chunks_of_documents(doc_ids_bt, size)
    same_bcts = (docs_bcl[..., :, None] == docs_bcl[..., None, :])[:, :, None]
    begun_bcl, ended_bcl = docs_bcl == before_bc1, docs_bcl == docs_bcl[..., -1:]
    reach, to_end = (m * same[:, :, None, :, None] for m, same in ((made.reach, begun_bcl), (made.to_end, ended_bcl)))
    return Products(made.qk * same_bcts, made.kk * same_bcts, reach, to_end)


def flops_per_position(n: int, p: int) -> float:
    """Of one head, forward; one multiply-add is two. Element-wise work is not counted."""
    within, across = (CHUNK - 1) * n + CHUNK * (n + 2 * p), 3 * n * p
    return 2.0 * (inverse_flops(CHUNK) + within + across)


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    return chunked(inputs, CHUNK)


def _run_step(inputs: StepInputs) -> Tensor:
    return step(*inputs)


channel_delta_rule = Path(_run, tolerance=TOLERANCE)
channel_delta_step = Path(_run_step, tolerance=TOLERANCE)
