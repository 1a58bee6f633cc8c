"""The gated delta rule as in torch_path.py, without views of diagonal blocks: the inverse by products of chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gated_delta_rule.reference import DeltaInputs, DeltaOutputs
from kernels.gated_delta_rule.torch_path import CHUNK, TOLERANCE
from kernels.operator import Path
from kernels.static import identity, intervals, lower_triangle, padded, parts, unbound


class Chunks(NamedTuple):
    """Inputs by chunk, in float32 at least, and what a chunk computes of them. n is 1 if all channels of a key fade
    alike."""

    q: Tensor  # [b, c, h, l, n]
    k: Tensor
    v: Tensor  # [b, c, h, l, p]
    beta: Tensor  # [b, c, h, l]
    qk: Tensor  # [b, c, h, t, s]: what a query reads of an earlier key, zero for s > t and between documents
    kk: Tensor  # as qk, of a key
    reach: Tensor  # [b, c, h, l, n]: what a position keeps of the state before the chunk
    to_end: Tensor  # [b, c, h, l, n]: what the chunk's end keeps of a key


def memory_of(chunks: Chunks, initial_bhpn: Tensor | None, num_positions: int) -> tuple[Tensor, Tensor]:
    """y_bthp and the state after: `chunked` of torch_path.py, whose names these are."""
    q, k, v, beta, qk, kk, reach, to_end = chunks
    lower = beta[..., None] * kk * lower_triangle(CHUNK, kk, -1)
    scaled = torch.cat([v, k * reach], -1) * beta[..., None]
    u_fresh, u_per_state = parts(torch.matmul(_inverse(lower), scaled), (v.shape[-1], k.shape[-1]))

    zeros = torch.zeros_like(v[:, 0, :, 0, :, None] * k[:, 0, :, 0, None, :])
    state = zeros if initial_bhpn is None else initial_bhpn.to(v.dtype)
    states, written = [], []
    k_end, carry = k * to_end, reach[..., CHUNK - 1 :, :]
    for fresh, per_state, k_c, carry_c in zip(
        *(unbound(m, 1) for m in (u_fresh, u_per_state, k_end, carry)), strict=True
    ):
        states.append(state)
        written.append(fresh - torch.matmul(per_state, state.transpose(-1, -2)))
        state = carry_c * state + torch.matmul(written[-1].transpose(-1, -2), k_c)
    across = torch.matmul(q * reach, torch.stack(states, 1).transpose(-1, -2))
    y = across + torch.matmul(qk, torch.stack(written, 1))
    return padded(y.transpose(2, 3).flatten(1, 2), 0, -(-num_positions % CHUNK)), state


def by_chunk(m: Tensor) -> Tensor:
    """[b, t, h, ...] to [b, c, h, l, ...], zero beyond t: such positions neither erase nor write."""
    return padded(m, 0, -m.shape[1] % CHUNK).unflatten(1, (-1, CHUNK)).transpose(2, 3)


class SameDocument(NamedTuple):
    """1 where two places are of one document, else 0."""

    pair: Tensor  # [b, c, 1, t, s]: two positions of a chunk
    begun: Tensor  # [b, c, 1, l]: a position, and the one before its chunk
    ended: Tensor  # [b, c, 1, l]: a position, and the last one of its chunk


def same_document(doc_ids_bt: Tensor, dtype: torch.dtype) -> SameDocument:
    """By chunk. The last document goes on beyond t."""
    t = doc_ids_bt.shape[1]
    docs_bcl = torch.cat([doc_ids_bt, doc_ids_bt[:, t - 1 :].expand(-1, -t % CHUNK)], 1).unflatten(1, (-1, CHUNK))
    before_bc1 = torch.cat([docs_bcl[:, :1, :1], docs_bcl[:, :-1, CHUNK - 1 :]], 1)
    same = (
        docs_bcl[..., :, None] == docs_bcl[..., None, :],
        docs_bcl == before_bc1,
        docs_bcl == docs_bcl[..., CHUNK - 1 :],
    )
    return SameDocument(*(m.to(dtype)[:, :, None] for m in same))


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    dtype = torch.promote_types(inputs.v_bthp.dtype, torch.float32)
    q, k, v, log_decay, beta = (by_chunk(m.to(dtype)) for m in inputs[:5])
    decay, reach = _decays(log_decay, inputs.doc_ids_bt)
    k_t = k.transpose(-1, -2)
    qk, kk = torch.matmul(q, k_t) * decay, torch.matmul(k, k_t) * decay
    chunks = Chunks(q, k, v, beta, qk, kk, reach[..., None], decay[..., CHUNK - 1, :, None])
    y_bthp, state = memory_of(chunks, inputs.initial_bhpn, inputs.v_bthp.shape[1])
    return DeltaOutputs(y_bthp.to(inputs.v_bthp.dtype), state)


def _decays(log_decay_bchl: Tensor, doc_ids_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """decay [b, c, h, t, s] and reach [b, c, h, l]."""
    lower = lower_triangle(CHUNK, log_decay_bchl)
    decay = torch.exp(intervals(log_decay_bchl)) * lower
    reach = torch.exp(torch.matmul(log_decay_bchl, lower.t()))
    if doc_ids_bt is None:
        return decay, reach
    same = same_document(doc_ids_bt, decay.dtype)
    return decay * same.pair, reach * same.begun


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower L, from inverted diagonal blocks that double in size.

    With X the inverses of the blocks and B the corners of L between two of them, the next are X - X B X.
    """
    inverse = identity(lower.shape[-1], lower).expand_as(lower)
    for _, corner in doublings(lower):
        inverse = inverse - torch.matmul(torch.matmul(inverse, lower * corner), inverse)
    return inverse


def doublings(like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Blocks on the diagonal of [l, l] that double in size, from 1 to l / 2, as ones and zeros of the dtype of `like`:
    the blocks, and the corners of which each joins two."""
    row = torch.arange(like.shape[-1], device=like.device)
    found, size = [], 1
    while size < like.shape[-1]:
        block = row // size
        joined = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        found.append(((block[:, None] == block).to(like.dtype), joined.to(like.dtype)))
        size *= 2
    return found


gated_delta_rule = Path(_run, tolerance=TOLERANCE)
