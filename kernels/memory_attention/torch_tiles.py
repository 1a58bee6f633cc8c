"""The tiles of plain-torch memory attention: matrix products over a block of keys and their gradients.

The fading key of position i - W is laid beside the window key of position i: both sets are then read from W before a
tile's first query to its last, and are one contiguous block under one mask. Slots are gathered by chunk. Scores of both
stand side by side, so that one softmax sees all sets: the block's product runs on over the slots' columns, where its
numbers mean nothing and are replaced, because a batched product is only fast into contiguous memory.

Inside, heads come before time. n: batch x key/value heads, g: query heads per key/value head, r: g x the tile's
queries, j: places in the block, z: sets side by side (window, then fading), c: columns of scores, (j z) then slots.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kernels.memory_attention.torch_layout import LaidOut, Layout, Tile, additive

KEYS, VALUES = range(2)  # along the first axis of kv and slots


class Scratch:
    """Buffers that every tile of a call overwrites: new ones would cost more in page faults than the arithmetic."""

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
        """scale * a b, in `dtype` (that of a if None)."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.take(name, shape, dtype or a.dtype)
        if out.dtype == a.dtype:
            return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        return torch.mul(torch.bmm(a, b, out=self.take("narrow", shape, a.dtype)), scale, out=out)


class Operands:
    """The inputs laid out for the tiles, and what each tile computes from them."""

    def __init__(self, layout: Layout, laid_out: LaidOut) -> None:
        self.layout, self.laid_out = layout, laid_out
        self.q_ngtp, self.kv = laid_out.q_ngtp, laid_out.kv_2njzp
        self.scratch = Scratch(self.q_ngtp.device)

    @property
    def eidetic_q_ngtp(self) -> Tensor:
        return _given(self.laid_out.eidetic_q_ngtp)

    @property
    def slots_j2nmp(self) -> Tensor:
        return _given(self.laid_out.slots_j2nmp)

    def probabilities(self, tile: Tile, fresh: bool = False) -> Tensor:
        """The softmax over all sets, [n, r, c]; in memory of its own if `fresh`, else until the next tile's."""
        layout, scratch = self.layout, Scratch(self.kv.device) if fresh else self.scratch
        far_q_ngtp = self.laid_out.eidetic_q_ngtp
        scores_nrc = self.products(scratch, "scores", tile, KEYS, self.q_ngtp, far_q_ngtp, layout.scale)
        by_query = scores_nrc.view(layout.batch, layout.kv_heads, layout.group, tile.end - tile.start, -1)
        by_query[..., : tile.near].add_(self._near_mask(tile))
        if layout.slots:
            by_query[..., tile.near :].add_(self._slots_mask(tile))
        return torch.softmax(scores_nrc, -1, out=scores_nrc)

    def products(
        self,
        scratch: Scratch,
        name: str,
        tile: Tile,
        of: int,
        a_ngtp: Tensor,
        far_a_ngtp: Tensor | None,
        scale: float = 1.0,
    ) -> Tensor:
        """scale * a b^T for the tile's rows of a, b all its keys or values; slots meet rows of far_a. [n, r, c]."""
        layout = self.layout
        block_npc = layout.block(self.kv[of], tile, extra=layout.slots).transpose(1, 2)
        found_nrc = scratch.bmm(name, rows_of(a_ngtp, tile), block_npc, layout.dtype, scale)
        if layout.slots and far_a_ngtp is not None:
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
            tile.end - tile.start,
            tile.last - tile.first,
            first - tile.start,
            layout.window_size,
            tile.sets,
            without,
            layout.dtype,
            self.kv.device,
        )
        docs_bt, docs_b1jz = self.laid_out.docs_bt, self.laid_out.docs_b1jz
        if docs_bt is None or docs_b1jz is None:
            return mask
        keys_b1c = docs_b1jz[:, :, tile.first : tile.last, : tile.sets].flatten(2)
        same = docs_bt[:, tile.start : tile.end, None] == keys_b1c
        return torch.where(same, mask, float("-inf"))[:, None, None]

    def _slots_mask(self, tile: Tile) -> Tensor:
        mask, docs_bt = _given(self.laid_out.empty_bjm)[:, None, None, None, tile.chunk], self.laid_out.docs_bt
        if docs_bt is None:
            return mask
        chunk_start = tile.chunk * self.layout.chunk_size
        same_bt = docs_bt[:, tile.start : tile.end] == docs_bt[:, chunk_start : chunk_start + 1]
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
        grad_q = scratch.bmm("rows", grad_nrc[..., near], keys_ncp, scale=self.layout.scale)
        put_queries(self.q_ngtp, tile, grad_q)
        self._add(KEYS, tile, grad_nrc[..., near], rows_of(operands.q_ngtp, tile), self.layout.scale)
        self._add(VALUES, tile, probs_nrc[..., near], grad_out_nrp)
        if self.layout.slots:
            slots, grad_slots = operands.slots_j2nmp[tile.chunk], self.slots_j2nmp[tile.chunk]
            grad_q = scratch.bmm("rows", grad_nrc[..., far], slots[KEYS], scale=self.layout.scale)
            put_queries(self.eidetic_q_ngtp, tile, grad_q)
            far_q_nrp = rows_of(operands.eidetic_q_ngtp, tile)
            grad_slots[KEYS].baddbmm_(grad_nrc[..., far].transpose(1, 2), far_q_nrp, alpha=self.layout.scale)
            grad_slots[VALUES].baddbmm_(probs_nrc[..., far].transpose(1, 2), grad_out_nrp)

    def _add(self, to: int, tile: Tile, a_nrc: Tensor, b_nrp: Tensor, scale: float = 1.0) -> None:
        """Into scratch first: a product added up in place in a block, which is not contiguous, is slower."""
        block_ncp = self.layout.block(self.kv[to], tile)
        block_ncp.add_(self.operands.scratch.bmm("block", a_nrc.transpose(1, 2), b_nrp, scale=scale))

    def by_input(self, own_values: bool) -> list[Tensor | None]:
        """Gradients of FlatInputs.sets; own_values: the slots have values other than the window's."""
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
        into.index_add_(0, _given(self.operands.laid_out.index_jnm).flatten(), slots_jnmp.reshape(-1, p))
        return into.view(n, -1, p)

    def _fading(self, kv_njzp: Tensor) -> Tensor:
        places, rows = self.layout.fading_places()
        grad_nsp = kv_njzp.new_zeros(kv_njzp.shape[0], self.layout.fading_rows, kv_njzp.shape[3])
        grad_nsp[:, rows] = kv_njzp[:, places, 1]
        return self._by_head(grad_nsp)


def softmax_backward(grad: Tensor, probs: Tensor) -> None:
    """grad <- probs * (grad - sum(probs * grad)), in place."""
    torch.ops.aten._softmax_backward_data.out(grad, probs, -1, probs.dtype, grad_input=grad)


@lru_cache(maxsize=256)
def band(
    num_queries: int,
    places: int,
    shift: int,
    span: int,
    sets: int,
    without: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Additive mask [queries, (j z)]: 0 if 0 <= distance < span, query r standing at r and place j at j + shift;
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


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
