"""Plain-torch memory attention: a loop over query tiles, matrix products inside.

The fading key of position i - W is laid beside the window key of position i: both sets are then read from W before a
tile's first query to its last, and are one contiguous block under one mask. Slots are gathered by chunk. Scores of both
stand side by side, so that one softmax sees all sets: the block's product runs on over the slots' columns, where its
numbers mean nothing and are replaced, because a batched product is only fast into contiguous memory.

Short calls keep their probabilities for the backward. Longer ones compute them again, so that nothing of size queries x
keys outlives its tile and memory stays linear in t.

Inside, heads come before time. n: batch x key/value heads, g: query heads a key/value head, r: g x the tile's queries,
j: places in the block, z: sets side by side (window, then fading), c: columns of scores, (j z) then slots.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from kernels.memory_attention.layout import Geometry, Layout, Tile, additive, lay_out

KEPT_BYTES = 32 << 20  # probabilities that a call keeps for its backward, at most
NUM_TENSORS = 8  # that lay_out gives
KEYS, VALUES = range(2)  # along the first axis of kv and slots


class MemoryAttention(torch.autograd.Function):
    """inputs: q, window k and v, fading k and v, eidetic q, k and v as in kernels.memory_attention, None where there
    is no such set; an eidetic v of None stands for the window's."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        layout = Layout.of(geometry, index_bjm, inputs)
        tensors = lay_out(layout, index_bjm, doc_ids_bt, inputs)
        operands = Operands(layout, tensors)
        keep = any(ctx.needs_input_grad) and layout.scores_bytes() <= KEPT_BYTES
        kept = []
        out_bthp = torch.empty_like(cast(Tensor, inputs[0]))
        for tile in layout.tiles():
            probs_nrc = operands.probabilities(tile, fresh=keep)
            if keep:
                kept.append(probs_nrc)
            layout.put_rows(out_bthp, tile, operands.values(tile, probs_nrc.to(operands.kv.dtype)))
        ctx.save_for_backward(*tensors, *kept)
        ctx.layout, ctx.own_values = layout, inputs[-1] is not None
        return out_bthp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        saved = ctx.saved_tensors  # asked for once: under activation checkpointing that computes them
        tensors, kept = saved[:NUM_TENSORS], saved[NUM_TENSORS:]
        operands = Operands(layout, tensors)
        grads = Gradients(operands)
        grad_out_ngtp = layout.heads_first(grad_outputs[0], layout.group)
        for i, tile in enumerate(layout.tiles()):
            probs_nrc = kept[i] if kept else operands.probabilities(tile)
            grads.add(tile, probs_nrc, grad_out_ngtp)
        return None, None, None, *grads.by_input(ctx.own_values)


class Scratch:
    """Buffers that every tile of a call writes anew: fresh ones would cost more in page faults than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """scale * a b, in `dtype` (that of a where None)."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.take(name, shape, dtype or a.dtype)
        if out.dtype == a.dtype:
            return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        return torch.mul(torch.bmm(a, b, out=self.take("narrow", shape, a.dtype)), scale, out=out)


class Operands:
    """The inputs laid out for the tiles, and what each tile computes from them."""

    def __init__(self, layout: Layout, tensors: tuple[Tensor | None, ...]) -> None:
        self.layout = layout
        self.q_ngtp, self.kv, self.docs_bt, self.docs_b1jz = cast(Any, tensors[:4])
        self.eidetic_q_ngtp, self.slots_j2nmp, self.index_jnm, self.empty_bjm = cast(Any, tensors[4:])
        self.scratch = Scratch(self.q_ngtp.device)
        self.scale: float = self.q_ngtp.shape[-1] ** -0.5

    def probabilities(self, tile: Tile, fresh: bool = False) -> Tensor:
        """The softmax over all sets, [n, r, c]; in memory of its own if `fresh`, else until the next tile's."""
        layout, scratch = self.layout, Scratch(self.kv.device) if fresh else self.scratch
        scores_nrc = self.products(scratch, "scores", tile, KEYS, self.q_ngtp, self.eidetic_q_ngtp, self.scale)
        by_query = scores_nrc.view(layout.batch, layout.kv_heads, layout.group, tile.end - tile.start, -1)
        by_query[..., : tile.near].add_(self._near_mask(tile))
        if layout.slots:
            by_query[..., tile.near :].add_(self._slots_mask(tile))
        return torch.softmax(scores_nrc, -1, out=scores_nrc)

    def products(
        self, scratch: Scratch, name: str, tile: Tile, of: int, a_ngtp: Tensor, far_a_ngtp: Tensor, scale: float = 1.0
    ) -> Tensor:
        """scale * a b^T for the tile's rows of a, b all its keys or values; slots meet rows of far_a. [n, r, c]."""
        layout = self.layout
        block_npc = layout.block(self.kv[of], tile, extra=layout.slots).transpose(1, 2)
        found_nrc = scratch.bmm(name, rows_of(a_ngtp, tile), block_npc, layout.dtype, scale)
        if layout.slots:
            slots_npm = self.slots_j2nmp[tile.chunk, of].transpose(1, 2)
            far_nrm = self.scratch.bmm("far", rows_of(far_a_ngtp, tile), slots_npm, layout.dtype, scale)
            found_nrc[..., tile.near :].copy_(far_nrm)
        return found_nrc

    def values(self, tile: Tile, probs_nrc: Tensor) -> Tensor:
        """The values of the tile's keys, weighted, [n, r, p]."""
        block_ncp = self.layout.block(self.kv[VALUES], tile)
        found_nrp = self.scratch.bmm("rows", probs_nrc[..., : tile.near], block_ncp)
        if self.layout.slots:
            found_nrp.baddbmm_(probs_nrc[..., tile.near :], self.slots_j2nmp[tile.chunk, VALUES])
        return found_nrp

    def _near_mask(self, tile: Tile) -> Tensor:
        """[queries, (j z)], or with documents [b, 1, 1, queries, (j z)]."""
        layout = self.layout
        first = tile.first + layout.begin
        without = min(max(0, layout.fading_from - first), tile.last - tile.first)
        mask = band(
            tile.end - tile.start, tile.last - tile.first, first - tile.start, layout.geometry.window_size,
            tile.sets, without, layout.dtype, self.kv.device,
        )  # fmt: skip
        if self.docs_bt is None:
            return mask
        keys_b1c = self.docs_b1jz[:, :, tile.first : tile.last, : tile.sets].flatten(2)
        same = self.docs_bt[:, tile.start : tile.end, None] == keys_b1c
        return torch.where(same, mask, float("-inf"))[:, None, None]

    def _slots_mask(self, tile: Tile) -> Tensor:
        mask: Tensor = self.empty_bjm[:, None, None, None, tile.chunk]
        if self.docs_bt is None:
            return mask
        chunk_start = tile.chunk * self.layout.geometry.chunk_size
        same_bt = self.docs_bt[:, tile.start : tile.end] == self.docs_bt[:, chunk_start : chunk_start + 1]
        return mask + additive(same_bt, self.layout.dtype)[:, None, None, :, None]


class Gradients:
    """Gradients by the inputs, added up tile by tile in the layout of the operands."""

    def __init__(self, operands: Operands) -> None:
        self.operands, self.layout = operands, operands.layout
        self.q_ngtp = torch.empty_like(operands.q_ngtp)
        self.kv = torch.zeros_like(operands.kv)
        if self.layout.slots:
            self.eidetic_q_ngtp = torch.empty_like(operands.eidetic_q_ngtp)
            self.slots_j2nmp = torch.zeros_like(operands.slots_j2nmp)

    def add(self, tile: Tile, probs_nrc: Tensor, grad_out_ngtp: Tensor) -> None:
        operands, scratch, dtype = self.operands, self.operands.scratch, self.kv.dtype
        grad_nrc = operands.products(scratch, "grads", tile, VALUES, grad_out_ngtp, grad_out_ngtp)
        softmax_backward(grad_nrc, probs_nrc)
        probs_nrc, grad_nrc = probs_nrc.to(dtype), grad_nrc.to(dtype)
        grad_out_nrp, near, far = rows_of(grad_out_ngtp, tile), slice(0, tile.near), slice(tile.near, None)

        keys_ncp = self.layout.block(operands.kv[KEYS], tile)
        grad_q = scratch.bmm("rows", grad_nrc[..., near], keys_ncp, scale=operands.scale)
        put_queries(self.q_ngtp, tile, grad_q)
        self._add(KEYS, tile, grad_nrc[..., near], rows_of(operands.q_ngtp, tile), operands.scale)
        self._add(VALUES, tile, probs_nrc[..., near], grad_out_nrp)
        if self.layout.slots:
            slots, grad_slots = operands.slots_j2nmp[tile.chunk], self.slots_j2nmp[tile.chunk]
            grad_q = scratch.bmm("rows", grad_nrc[..., far], slots[KEYS], scale=operands.scale)
            put_queries(self.eidetic_q_ngtp, tile, grad_q)
            far_q_nrp = rows_of(operands.eidetic_q_ngtp, tile)
            grad_slots[KEYS].baddbmm_(grad_nrc[..., far].transpose(1, 2), far_q_nrp, alpha=operands.scale)
            grad_slots[VALUES].baddbmm_(probs_nrc[..., far].transpose(1, 2), grad_out_nrp)

    def _add(self, to: int, tile: Tile, a_nrc: Tensor, b_nrp: Tensor, scale: float = 1.0) -> None:
        """Into scratch first: a product added up in place in a block, which is not contiguous, is slower."""
        block_ncp = self.layout.block(self.kv[to], tile)
        block_ncp.add_(self.operands.scratch.bmm("block", a_nrc.transpose(1, 2), b_nrp, scale=scale))

    def by_input(self, own_values: bool) -> list[Tensor | None]:
        """In the order of MemoryAttention's inputs; own_values: the slots have values other than the window's."""
        layout = self.layout
        grad_k, grad_v = self.kv[:, :, : layout.window_rows, 0]
        fading = [self._fading(x_njzp) for x_njzp in self.kv] if layout.sets == 2 else [None, None]
        eidetic: list[Tensor | None] = [None, None, None]
        if layout.slots:
            slot_k, slot_v = (self._scattered(x_jnmp) for x_jnmp in self.slots_j2nmp.unbind(1))
            if not own_values:
                grad_v = slot_v.add_(grad_v)
            eidetic = [layout.time_first(self.eidetic_q_ngtp), self._by_head(slot_k)]
            eidetic.append(self._by_head(slot_v) if own_values else None)
        return [layout.time_first(self.q_ngtp), self._by_head(grad_k), self._by_head(grad_v), *fading, *eidetic]

    def _by_head(self, x_nsp: Tensor) -> Tensor:
        return self.layout.time_first(x_nsp[:, None])

    def _scattered(self, slots_jnmp: Tensor) -> Tensor:
        """[n, s, p]: what the slots of all chunks give to the rows they were gathered from."""
        n, p = slots_jnmp.shape[1], slots_jnmp.shape[-1]
        into = slots_jnmp.new_zeros(n * self.layout.eidetic_rows, p)
        into.index_add_(0, self.operands.index_jnm.flatten(), slots_jnmp.reshape(-1, p))
        return into.view(n, -1, p)

    def _fading(self, kv_njzp: Tensor) -> Tensor:
        places, rows = self.layout.fading_places()
        grad_nsp = kv_njzp.new_zeros(kv_njzp.shape[0], self.layout.fading_rows, kv_njzp.shape[3])
        grad_nsp[:, rows] = kv_njzp[:, places, 1]
        return self._by_head(grad_nsp)


def set_masses(
    geometry: Geometry, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, inputs: tuple[Tensor | None, ...]
) -> Tensor:
    """Sums of the probabilities over window, fading and eidetic keys, averaged over heads, [b, t, 3]."""
    layout = Layout.of(geometry, index_bjm, inputs)
    operands = Operands(layout, lay_out(layout, index_bjm, doc_ids_bt, inputs))
    mass_bt3 = operands.q_ngtp.new_zeros(layout.batch, geometry.num_queries, 3)
    for tile in layout.tiles():
        probs_nrc = operands.probabilities(tile)
        near = probs_nrc[..., : tile.near].unflatten(2, (-1, tile.sets))
        masses = [*near.sum(2).unbind(2), *[torch.zeros_like(near[:, :, 0, 0])] * (2 - tile.sets)]
        masses.append(probs_nrc[..., tile.near :].sum(2))
        for i, mass_nr in enumerate(masses):
            mass_bt3[:, tile.start : tile.end, i] = mass_nr.view(layout.batch, -1, tile.end - tile.start).mean(1)
    return mass_bt3


def softmax_backward(grad: Tensor, probs: Tensor) -> None:
    """grad <- probs * (grad - sum(probs * grad)), in place."""
    torch.ops.aten._softmax_backward_data.out(grad, probs, -1, probs.dtype, grad_input=grad)


@lru_cache(maxsize=256)
def band(
    num_queries: int, places: int, shift: int, span: int, sets: int, without: int, dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Additive mask [queries, (j z)]: 0 where 0 <= distance < span, query r standing at r and place j at j + shift;
    the first `without` places have no fading key."""
    place = torch.arange(places, device=device)
    distance = torch.arange(num_queries, device=device)[:, None] - (place + shift)
    window = (distance >= 0) & (distance < span)
    allowed = torch.stack([window, window & (place >= without)][:sets], -1).flatten(1)
    return additive(allowed, dtype)


def rows_of(x_ngtp: Tensor, tile: Tile) -> Tensor:
    n, g, _, p = x_ngtp.shape
    return x_ngtp[:, :, tile.start : tile.end].reshape(n, g * (tile.end - tile.start), p)


def put_queries(into_ngtp: Tensor, tile: Tile, rows_nrp: Tensor) -> None:
    into = into_ngtp[:, :, tile.start : tile.end]
    into.copy_(rows_nrp.view_as(into))
