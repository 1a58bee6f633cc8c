"""Plain-torch gated delta rule: matrix products inside chunks, a recurrence over chunk states between.

c: chunks, l: positions in a chunk. Rows of Q, K, V are the positions of a chunk; S is the state before it.

    decay[t, s]  = exp(sum of log_decay over (s, t])  for s <= t, else 0    (also 0 between documents)
    reach[t]     = exp(sum of log_decay over the chunk up to t)             what position t keeps of S
    L            = beta * K K^T * decay below the diagonal
    U            = (I + L)^-1 beta (V - reach K S^T)                        what each position writes
    y            = reach Q S^T + (Q K^T * decay) U
    S'           = reach[last] S + U^T (decay[last] K)

README.md has the derivation. Every exponent is a sum over one interval, formed by a product with a triangle of ones: it
is <= 0 and carries no rounding from outside the interval.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gated_delta_rule.reference import DeltaInputs, DeltaOutputs, StepInputs
from kernels.operator import Path

CHUNK = 64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def chunked(inputs: DeltaInputs, chunk_size: int) -> DeltaOutputs:
    """chunk_size: a power of two."""
    dtype, t = torch.promote_types(inputs.v_bthp.dtype, torch.float32), inputs.v_bthp.shape[1]
    q, k, v, log_decay, beta = (by_chunk(m.to(dtype), chunk_size) for m in inputs[:5])
    decay, reach = decays(log_decay, inputs.doc_ids_bt)
    k_t = k.transpose(-1, -2)
    lower = beta[..., None] * torch.matmul(k, k_t) * decay.tril(-1)
    scaled = torch.cat([v, k * reach[..., None]], -1) * beta[..., None]
    u_fresh, u_per_state = Solve.apply(lower, scaled).split([v.shape[-1], k.shape[-1]], -1)

    zeros = v.new_zeros(v[:, 0, :, 0].shape + k.shape[-1:])
    state = zeros if inputs.initial_bhpn is None else inputs.initial_bhpn.to(dtype)
    states, written = [], []
    k_end, carry = k * decay[..., -1, :, None], reach[..., -1, None, None]
    for fresh, per_state, k_c, carry_c in zip(
        *(m.unbind(1) for m in (u_fresh, u_per_state, k_end, carry)), strict=True
    ):
        states.append(state)
        written.append(fresh - torch.matmul(per_state, state.transpose(-1, -2)))
        state = carry_c * state + torch.matmul(written[-1].transpose(-1, -2), k_c)
    across = torch.matmul(q * reach[..., None], torch.stack(states, 1).transpose(-1, -2))
    y = across + torch.matmul(torch.matmul(q, k_t) * decay, torch.stack(written, 1))
    return DeltaOutputs(y.transpose(2, 3).flatten(1, 2)[:, :t].to(inputs.v_bthp.dtype), state)


def flops_per_position(n: int, p: int) -> float:
    """Of one head, forward; one multiply-add is two. Element-wise work is not counted."""
    within, across = CHUNK * (CHUNK + 1) + CHUNK * (3 * n + 2 * p), 3 * n * p
    return 2.0 * (inverse_flops(CHUNK) + within + across)


def inverse_flops(size: int) -> float:
    """Multiply-adds of `inverse_of`, per row."""
    return (size**2 - 1) / 3


def by_chunk(m: Tensor, size: int) -> Tensor:
    """[b, t, h, ...] to [b, c, h, l, ...], zero beyond t: such positions neither erase nor write."""
    pad = -m.shape[1] % size
    chunks = F.pad(m, (0, 0) * (m.dim() - 2) + (0, pad)).unflatten(1, (-1, size)).transpose(2, 3)
    return chunks.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of a single head


def decays(log_decay_bchl: Tensor, doc_ids_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """decay [b, c, h, t, s] and reach [b, c, h, l] as defined above."""
    size = log_decay_bchl.shape[-1]
    lower = log_decay_bchl.new_ones(size, size).tril()
    decay = torch.exp(torch.matmul(log_decay_bchl[..., None, :] * lower, lower.tril(-1))) * lower
    reach = torch.exp(torch.matmul(log_decay_bchl, lower.t()))
    if doc_ids_bt is None:
        return decay, reach
    docs_bcl, before_bc1 = chunks_of_documents(doc_ids_bt, size)
    same_bcts = docs_bcl[..., :, None] == docs_bcl[..., None, :]
    return decay * same_bcts[:, :, None], reach * (docs_bcl == before_bc1)[:, :, None]


def chunks_of_documents(doc_ids_bt: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Documents by chunk, the last one going on beyond t, and that of the position before each chunk [b, c, 1]."""
    pad = -doc_ids_bt.shape[1] % size
    docs_bcl = torch.cat([doc_ids_bt, doc_ids_bt[:, -1:].expand(-1, pad)], 1).unflatten(1, (-1, size))
    return docs_bcl, torch.cat([docs_bcl[:, :1, :1], docs_bcl[:, :-1, -1:]], 1)


class Solve(torch.autograd.Function):
    """(I + L)^-1 R for strictly lower L; the gradient of L is right below its diagonal, where L depends on anything."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, right: Tensor) -> Tensor:
        inverse = inverse_of(lower)
        solved = torch.matmul(inverse, right)
        ctx.save_for_backward(inverse, solved)
        return solved

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solved = ctx.saved_tensors
        dright = torch.matmul(inverse.transpose(-1, -2), grad_outputs[0])
        return -torch.matmul(dright, solved.transpose(-1, -2)), dright


def inverse_of(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower L, whose size is a power of two: by products of blocks, which double in size.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    blocks = torch.ones_like(lower[..., :1, None])  # [..., block, row, column]: the inverted diagonal blocks
    while (size := blocks.shape[-1]) < lower.shape[-1]:
        tiles = lower.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
        below = tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        corner = -torch.matmul(torch.matmul(second, below), first)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        blocks = torch.cat([top, torch.cat([corner, second], -1)], -2)
    return blocks.squeeze(-3)


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    return chunked(inputs, CHUNK)


def _run_step(inputs: StepInputs) -> Tensor:
    return step(*inputs[:3], inputs.log_decay_bh[..., None], *inputs[4:])


def step(q: Tensor, k: Tensor, v: Tensor, log_decay_bhn: Tensor, beta: Tensor, state_bhpn: Tensor) -> Tensor:
    """y_bhp of the next position; the state is updated. log_decay_bhn: of each channel of the keys, or one."""
    output_dtype = v.dtype
    q, k, v, log_decay, beta = (m.to(state_bhpn.dtype) for m in (q, k, v, log_decay_bhn, beta))
    state_bhpn.mul_(torch.exp(log_decay)[..., None, :])
    written_bhp = beta[..., None] * (v - (state_bhpn @ k[..., None])[..., 0])
    state_bhpn.add_(written_bhp[..., None] * k[..., None, :])
    return (state_bhpn @ q[..., None])[..., 0].to(output_dtype)


gated_delta_rule = Path(_run, tolerance=TOLERANCE)
gated_delta_step = Path(_run_step, tolerance=TOLERANCE)
