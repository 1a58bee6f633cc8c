"""Plain-torch memory attention: a loop over query tiles (torch_tiles.py), and the decoding step.

Short calls keep their probabilities for the backward. Longer ones compute them again, so that nothing of size queries x
keys outlives its tile and memory stays linear in t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.memory_attention.reference import AttentionInputs, FlatInputs, StepInputs
from kernels.memory_attention.torch_layout import LaidOut, Layout, lay_out
from kernels.memory_attention.torch_tiles import Gradients, Operands
from kernels.operator import Path

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
KEPT_BYTES = 32 << 20  # probabilities that a call keeps for its backward, at most
NEG_INF = float("-inf")


class _MemoryAttention(torch.autograd.Function):
    """Takes the fields of FlatInputs."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        inputs = FlatInputs(*given)
        layout = Layout.of(inputs)
        laid_out = lay_out(layout, inputs)
        operands = Operands(layout, laid_out)
        keep = any(ctx.needs_input_grad) and layout.scores_bytes() <= KEPT_BYTES
        kept = []
        out_bthp = torch.empty_like(inputs.q)
        for tile in layout.tiles():
            probs_nrc = operands.probabilities(tile, fresh=keep)
            if keep:
                kept.append(probs_nrc)
            layout.put_rows(out_bthp, tile, operands.values(tile, probs_nrc.to(operands.kv.dtype)))
        ctx.save_for_backward(*laid_out, *kept)
        ctx.layout, ctx.own_values = layout, inputs.eidetic_v is not None
        return out_bthp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        saved = ctx.saved_tensors  # asked for once: under activation checkpointing that computes them
        num_laid_out = len(LaidOut._fields)
        operands, kept = Operands(layout, LaidOut(*saved[:num_laid_out])), saved[num_laid_out:]
        grads = Gradients(operands)
        grad_out_ngtp = layout.heads_first(grad_outputs[0], layout.group)
        for i, tile in enumerate(layout.tiles()):
            probs_nrc = kept[i] if kept else operands.probabilities(tile)
            grads.add(tile, probs_nrc, grad_out_ngtp)
        by_set = grads.by_input(ctx.own_values)
        return *by_set, *(None for _ in FlatInputs._fields[len(by_set) :])


def _run(inputs: AttentionInputs) -> Tensor:
    out_bthp: Tensor = _MemoryAttention.apply(*FlatInputs.of(inputs))
    return out_bthp


def _run_step(inputs: StepInputs) -> Tensor:
    """Scores of all sets side by side, one softmax."""
    q_bhp, k_brhp, v_brhp, position_b, fading, eidetic, window_size = inputs
    window_size = window_size or k_brhp.shape[1]
    sets = [(q_bhp, k_brhp, v_brhp, in_ring(k_brhp, position_b, 0, window_size))]
    if fading is not None:
        sets.append((q_bhp, *fading, in_ring(fading[0], position_b, window_size, window_size)))
    if eidetic is not None:
        q, k, v, slot_position_bm = eidetic
        sets.append((q, k, v, slot_position_bm >= 0))
    return attend(sets)


memory_attention = Path(_run, tolerance=TOLERANCE)
memory_attention_step = Path(_run_step, tolerance=TOLERANCE)


@torch.no_grad()
def attention_mass(inputs: AttentionInputs) -> Tensor:
    """Shares of attention that go to window, fading and eidetic memory: [b, t, 3], summing to 1, mean over heads."""
    flat = FlatInputs.of(inputs)
    layout = Layout.of(flat)
    operands = Operands(layout, lay_out(layout, flat))
    mass_bt3 = operands.q_ngtp.new_zeros(layout.batch, layout.num_queries, 3)
    for tile in layout.tiles():
        probs_nrc = operands.probabilities(tile)
        near = probs_nrc[..., : tile.near].unflatten(2, (-1, tile.sets))
        masses = [*near.sum(2).unbind(2), *[torch.zeros_like(near[:, :, 0, 0])] * (2 - tile.sets)]
        masses.append(probs_nrc[..., tile.near :].sum(2))
        for i, mass_nr in enumerate(masses):
            mass_bt3[:, tile.start : tile.end, i] = mass_nr.view(layout.batch, -1, tile.end - tile.start).mean(1)
    return mass_bt3


def in_ring(ring_br: Tensor, position_b: Tensor, age: int, window_size: int) -> Tensor:
    """Whether each slot of a ring holds a position that `position_b` reads, [b, r]."""
    size = ring_br.shape[1]
    age_br = (position_b[:, None] - torch.arange(size, device=ring_br.device)) % size
    return (age_br >= age) & (age_br < age + window_size) & (age_br <= position_b[:, None])


def attend(sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """One query per row, one softmax over several sets (q_bhp, k_bshp, v_bshp, allowed_bs). Returns [b, h, p]."""
    scores, values = [], []
    q = sets[0][0]
    b, h, p = q.shape
    kv_heads = sets[0][1].shape[2]
    for q_bhp, k_bshp, v_bshp, allowed_bs in sets:
        q_bkgp = (q_bhp * p**-0.5).view(b, kv_heads, h // kv_heads, p)
        score_bkgs = q_bkgp @ k_bshp.permute(0, 2, 3, 1).to(q.dtype)
        scores.append(score_bkgs.masked_fill(~allowed_bs[:, None, None], NEG_INF))
        values.append(v_bshp.transpose(1, 2).to(q.dtype))
    precise = torch.promote_types(q.dtype, torch.float32)
    probs = F.softmax(torch.cat(scores, -1), -1, dtype=precise).to(q.dtype).split([s.shape[-1] for s in scores], -1)
    out = probs[0] @ values[0]
    for prob, value in zip(probs[1:], values[1:], strict=True):
        out = out + prob @ value
    return out.reshape(b, h, p)
