"""The gated delta rule as in torch_path.py, without views of diagonal blocks: the inverse by products of chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_delta_rule.reference import DeltaInputs, DeltaOutputs
from kernels.gated_delta_rule.torch_path import CHUNK, TOLERANCE
from kernels.operator import Path
from kernels.static import intervals, lower_triangle, padded, parts, unbound


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    """As `chunked` of torch_path.py, whose names these are."""
    dtype, t = torch.promote_types(inputs.v_bthp.dtype, torch.float32), inputs.v_bthp.shape[1]
    q, k, v, log_decay, beta = (_by_chunk(m.to(dtype)) for m in inputs[:5])
    decay, reach = _decays(log_decay, inputs.doc_ids_bt)
    k_t = k.transpose(-1, -2)
    lower = beta[..., None] * torch.matmul(k, k_t) * decay * lower_triangle(CHUNK, decay, -1)
    scaled = torch.cat([v, k * reach[..., None]], -1) * beta[..., None]
    u_fresh, u_per_state = parts(torch.matmul(_inverse(lower), scaled), (v.shape[-1], k.shape[-1]))

    zeros = torch.zeros_like(v[:, 0, :, 0, :, None] * k[:, 0, :, 0, None, :])
    state = zeros if inputs.initial_bhpn is None else inputs.initial_bhpn.to(dtype)
    states, written = [], []
    k_end, carry = k * decay[..., CHUNK - 1, :, None], reach[..., CHUNK - 1, None, None]
    for fresh, per_state, k_c, carry_c in zip(
        *(unbound(m, 1) for m in (u_fresh, u_per_state, k_end, carry)), strict=True
    ):
        states.append(state)
        written.append(fresh - torch.matmul(per_state, state.transpose(-1, -2)))
        state = carry_c * state + torch.matmul(written[-1].transpose(-1, -2), k_c)
    across = torch.matmul(q * reach[..., None], torch.stack(states, 1).transpose(-1, -2))
    y = across + torch.matmul(torch.matmul(q, k_t) * decay, torch.stack(written, 1))
    y_bthp = padded(y.transpose(2, 3).flatten(1, 2), 0, -(-t % CHUNK))
    return DeltaOutputs(y_bthp.to(inputs.v_bthp.dtype), state)


def _by_chunk(m: Tensor) -> Tensor:
    """[b, t, h, ...] to [b, c, h, l, ...], zero beyond t: such positions neither erase nor write."""
    return padded(m, 0, -m.shape[1] % CHUNK).unflatten(1, (-1, CHUNK)).transpose(2, 3)


def _decays(log_decay_bchl: Tensor, doc_ids_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """decay [b, c, h, t, s] and reach [b, c, h, l]."""
    lower = lower_triangle(CHUNK, log_decay_bchl)
    decay = torch.exp(intervals(log_decay_bchl)) * lower
    reach = torch.exp(torch.matmul(log_decay_bchl, lower.t()))
    if doc_ids_bt is None:
        return decay, reach
    t = doc_ids_bt.shape[1]
    docs_bcl = torch.cat([doc_ids_bt, doc_ids_bt[:, t - 1 :].expand(-1, -t % CHUNK)], 1).unflatten(1, (-1, CHUNK))
    before_bc1 = torch.cat([docs_bcl[:, :1, :1], docs_bcl[:, :-1, CHUNK - 1 :]], 1)
    same_bcts = (docs_bcl[..., :, None] == docs_bcl[..., None, :]).to(decay.dtype)
    return decay * same_bcts[:, :, None], reach * (docs_bcl == before_bc1).to(reach.dtype)[:, :, None]


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower L, from inverted diagonal blocks that double in size.

    With X the inverses of the blocks and B the corners of L between two of them, the next are X - X B X.
    """
    row = torch.arange(lower.shape[-1], device=lower.device)
    inverse = (row[:, None] == row).to(lower.dtype).expand_as(lower)
    size = 1
    while size < lower.shape[-1]:
        block = row // size
        corner = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        inverse = inverse - torch.matmul(torch.matmul(inverse, lower * corner.to(lower.dtype)), inverse)
        size *= 2
    return inverse


gated_delta_rule = Path(_run, tolerance=TOLERANCE)
