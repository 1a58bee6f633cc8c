"""Plain-torch memory attention: a loop over query tiles, matrix products inside, scores recomputed in the backward.

Per tile the scores of the three sets are written side by side into one matrix, so one softmax sees them all, and memory
stays linear in t: nothing of size queries x keys outlives its tile.

Inside, heads come before time. n: batch x key/value heads, g: query heads a key/value head, r: g x the tile's queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

QUERY_TILE = 128
KEY_ALIGNMENT = 16  # a tile reads up to 15 keys more, masked, so that rows of scores start on cache lines


@dataclass(frozen=True)
class Geometry:
    """The static part of a call: which keys meet which queries. Positions count from the first query's."""

    num_queries: int
    window_size: int
    chunk_size: int
    num_past: int

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """(chunk, first query, end) of each tile, in order; a tile never crosses a chunk boundary."""
        for chunk, chunk_start in enumerate(range(0, self.num_queries, self.chunk_size)):
            chunk_end = min(chunk_start + self.chunk_size, self.num_queries)
            for start in range(chunk_start, chunk_end, QUERY_TILE):
                yield chunk, start, min(start + QUERY_TILE, chunk_end)

    def keys(self, start: int, end: int, age: int, past_rows: int) -> tuple[int, int]:
        """Positions [first, last) some query of the tile reads; age: 0 for the window, W for the fading memory."""
        first = start - age - self.window_size + 1
        first = max(-min(self.num_past, past_rows), first - first % KEY_ALIGNMENT)
        return first, max(first, end - age)


@dataclass(frozen=True)
class KeySet:
    """One of window, fading and eidetic memory: queries [n, g, t, p], keys and values [n, s, p]."""

    q_ngtp: Tensor
    k_nsp: Tensor
    v_nsp: Tensor
    age: int | None  # None: eidetic, read by index


@dataclass(frozen=True)
class TileSet:
    """The rows of one KeySet that one tile reads, `rows` saying where they came from."""

    q_nrp: Tensor
    k_nsp: Tensor
    v_nsp: Tensor
    mask: Tensor  # broadcasts to [b, kv heads, g, tile, s]: 0, or -inf where a query may not look
    masked: list[tuple[int, int]]  # the columns of the mask that are not all 0
    rows: slice | Tensor
    age: int | None


class MemoryAttention(torch.autograd.Function):
    """Arguments as in kernels.memory_attention; the three sets as (queries, keys, values) each."""

    @staticmethod
    def forward(
        ctx: Any, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, geometry: Geometry, *sets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index_bjm, doc_ids_bt, *sets)
        ctx.geometry = geometry
        operands = Operands(sets, index_bjm, doc_ids_bt, geometry)
        out_bthp = torch.empty_like(sets[0])
        for chunk, start, end in geometry.tiles():
            tile_sets = operands.tile(chunk, start, end)
            probs = operands.probabilities(tile_sets, end - start)
            out_nrp = operands.scratch.bmm("out", probs[0], tile_sets[0].v_nsp)
            for prob, tile_set in zip(probs[1:], tile_sets[1:], strict=True):
                torch.baddbmm(out_nrp, prob, tile_set.v_nsp, out=out_nrp)
            operands.put_rows(out_bthp, start, end, out_nrp)
        return out_bthp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        index_bjm, doc_ids_bt, *sets = ctx.saved_tensors
        geometry = ctx.geometry
        operands = Operands(tuple(sets), index_bjm, doc_ids_bt, geometry)
        scratch = operands.scratch
        grads = operands.zero_grads()
        grad_out_ngtp = operands.heads_first(grad_outputs[0], operands.group)
        for chunk, start, end in geometry.tiles():
            tile_sets = operands.tile(chunk, start, end)
            sizes = [s.k_nsp.shape[1] for s in tile_sets]
            probs = operands.probabilities(tile_sets, end - start)
            grad_out_nrp = rows_of(grad_out_ngtp, start, end)
            n, r, _ = grad_out_nrp.shape
            grad_scores = scratch.take("grad_scores", (n, r, sum(sizes)), operands.dtype)
            for part, tile_set in zip(grad_scores.split(sizes, -1), tile_sets, strict=True):
                scratch.bmm_into(part, grad_out_nrp, tile_set.v_nsp.transpose(1, 2))
            joined = scratch.take("scores", (n, r, sum(sizes)), operands.dtype)
            softmax_backward(grad_scores, joined)
            grad_parts = grad_scores.to(probs[0].dtype).split(sizes, -1)
            for tile_set, prob, ds in zip(tile_sets, probs, grad_parts, strict=True):
                grad = grads[tile_set.age]
                dq = grad.q_ngtp[:, :, start:end]
                dq.add_(scratch.bmm("rows", ds, tile_set.k_nsp).view_as(dq), alpha=operands.scale)
                add_product(grad.k_nsp, tile_set.rows, ds.transpose(1, 2), tile_set.q_nrp, operands.scale)
                add_product(grad.v_nsp, tile_set.rows, prob.transpose(1, 2), grad_out_nrp)
        flat: list[Tensor | None] = []
        for i, grad in enumerate(grads.values()):
            shares_q = i > 0 and grad.q_ngtp is grads[0].q_ngtp
            shares_v = i > 0 and grad.v_nsp is grads[0].v_nsp
            flat += [
                None if shares_q else operands.time_first(grad.q_ngtp, operands.group),
                operands.time_first(grad.k_nsp[:, None]),
                None if shares_v else operands.time_first(grad.v_nsp[:, None]),
            ]
        return None, None, None, *flat


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

    def bmm_into(self, out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """out <- scale * a b, in the precision of out."""
        if out.dtype == a.dtype:
            torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        else:
            torch.mul(self.bmm("product", a, b), scale, out=out)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.take(name, (a.shape[0], a.shape[1], b.shape[2]), a.dtype))


def softmax_backward(grad: Tensor, probs: Tensor) -> None:
    """grad <- probs * (grad - sum(probs * grad)), in place."""
    torch.ops.aten._softmax_backward_data.out(grad, probs, -1, probs.dtype, grad_input=grad)


class Operands:
    """The inputs with heads ahead of time, and what each tile takes from them."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        index_bjm: Tensor | None,
        doc_ids_bt: Tensor | None,
        geometry: Geometry,
    ) -> None:
        self.geometry = geometry
        self.doc_ids_bt = None if doc_ids_bt is None else doc_ids_bt.to(torch.int32)  # compares faster than int64
        q_bthp, k_bshp = tensors[:2]
        self.scratch = Scratch(q_bthp.device)
        self.gathered: tuple[int, Tensor, Tensor] | None = None
        self.batch, self.kv_heads = k_bshp.shape[0], k_bshp.shape[2]
        self.group = q_bthp.shape[2] // self.kv_heads
        self.scale = q_bthp.shape[-1] ** -0.5
        self.dtype = torch.float64 if q_bthp.dtype == torch.float64 else torch.float32
        ages = [0, geometry.window_size] if index_bjm is None or len(tensors) == 9 else [0]
        self.sets: list[KeySet] = []
        for i in range(0, len(tensors), 3):
            q, k, v = tensors[i : i + 3]
            age = None if index_bjm is not None and i + 3 == len(tensors) else ages[i // 3]
            shares_q = bool(self.sets) and q.data_ptr() == q_bthp.data_ptr()
            queries = self.sets[0].q_ngtp if shares_q else self.heads_first(q, self.group)
            shares_v = bool(self.sets) and v.data_ptr() == tensors[2].data_ptr()  # slots read the window's values
            values = self.sets[0].v_nsp if shares_v else self.heads_first(v)[:, 0]
            self.sets.append(KeySet(queries, self.heads_first(k)[:, 0], values, age))
        if index_bjm is not None:
            offsets_n = torch.arange(self.batch * self.kv_heads, device=k_bshp.device) * tensors[-1].shape[1]
            index_njm = index_bjm.clamp_min(0).repeat_interleave(self.kv_heads, 0) + offsets_n[:, None, None]
            self.index_jnm = index_njm.transpose(0, 1).contiguous()
            self.empty_slots = additive(index_bjm >= 0, self.dtype)

    def zero_grads(self) -> dict[int | None, KeySet]:
        """A buffer for each input, in the layout of the sets; sets that share an input share its buffer."""
        first, zeros = self.sets[0], torch.zeros_like
        q_grad, v_grad = zeros(first.q_ngtp), zeros(first.v_nsp)
        return {
            s.age: KeySet(
                q_grad if s.q_ngtp is first.q_ngtp else zeros(s.q_ngtp),
                zeros(s.k_nsp),
                v_grad if s.v_nsp is first.v_nsp else zeros(s.v_nsp),
                s.age,
            )
            for s in self.sets
        }

    def heads_first(self, x_bshp: Tensor, group: int = 1) -> Tensor:
        """[b, s, h, p] to [n, g, s, p], contiguous; without a copy where it lies so in memory."""
        b, s, h, p = x_bshp.shape
        return x_bshp.transpose(1, 2).contiguous().view(b * h // group, group, s, p)

    def put_rows(self, into_bthp: Tensor, start: int, end: int, rows_nrp: Tensor) -> None:
        by_head = rows_nrp.view(self.batch, self.kv_heads * self.group, end - start, -1)
        into_bthp[:, start:end].copy_(by_head.transpose(1, 2))

    def time_first(self, x_ngsp: Tensor, group: int = 1) -> Tensor:
        n, _, s, p = x_ngsp.shape
        return x_ngsp.view(self.batch, n * group // self.batch, s, p).transpose(1, 2)

    def tile(self, chunk: int, start: int, end: int) -> list[TileSet]:
        """What the tile's queries read, in the order of the sets; sets that reach no key yet are left out."""
        found = []
        for key_set in self.sets:
            q_nrp = rows_of(key_set.q_ngtp, start, end)
            if key_set.age is None:
                k, v = self._gather(key_set, chunk)
                mask = self._slots_mask(chunk, start, end)
                found.append(TileSet(q_nrp, k, v, mask, [(0, k.shape[1])], self.index_jnm[chunk], None))
                continue
            past = key_set.k_nsp.shape[1] - self.geometry.num_queries
            first, last = self.geometry.keys(start, end, key_set.age, past)
            if first < last:
                keys = slice(first + past, last + past)
                mask = self._band_mask(key_set.age, start, end, first, last)
                k, v = key_set.k_nsp[:, keys], key_set.v_nsp[:, keys]
                masked = self._masked_columns(key_set.age, start, end, first, last)
                found.append(TileSet(q_nrp, k, v, mask, masked, keys, key_set.age))
        return found

    def _gather(self, key_set: KeySet, chunk: int) -> tuple[Tensor, Tensor]:
        """The eidetic keys and values of a chunk, read once for all its tiles."""
        if self.gathered is None or self.gathered[0] != chunk:
            rows = self.index_jnm[chunk]
            self.gathered = (chunk, gather_rows(key_set.k_nsp, rows), gather_rows(key_set.v_nsp, rows))
        return self.gathered[1:]

    def _band_mask(self, age: int, start: int, end: int, first: int, last: int) -> Tensor:
        span = self.geometry.window_size
        device = self.sets[0].q_ngtp.device
        mask = band(end - start, last - first, first - start + age, span, self.dtype, device)
        if self.doc_ids_bt is None:
            return mask
        same = self.doc_ids_bt[:, start:end, None] == self.doc_ids_bt[:, None, first:last]
        return torch.where(same, mask, float("-inf"))[:, None, None]

    def _masked_columns(self, age: int, start: int, end: int, first: int, last: int) -> list[tuple[int, int]]:
        """Without documents, keys too old for the last query and too young for the first; with them, maybe any."""
        old = max(0, end - age - self.geometry.window_size - first)
        young = min(last, start - age + 1) - first
        if self.doc_ids_bt is not None or old >= young:
            return [(0, last - first)]
        return [(begin, stop) for begin, stop in ((0, old), (young, last - first)) if begin < stop]

    def _slots_mask(self, chunk: int, start: int, end: int) -> Tensor:
        mask = self.empty_slots[:, None, None, None, chunk]
        if self.doc_ids_bt is None:
            return mask
        chunk_start = chunk * self.geometry.chunk_size
        same = self.doc_ids_bt[:, start:end] == self.doc_ids_bt[:, chunk_start : chunk_start + 1]
        return mask + additive(same, self.dtype)[:, None, None, :, None]

    def probabilities(self, tile_sets: list[TileSet], num_queries: int) -> list[Tensor]:
        """The softmax over all sets, as one slice [n, r, s] a set, in the values' dtype."""
        sizes = [s.k_nsp.shape[1] for s in tile_sets]
        n, r, _ = tile_sets[0].q_nrp.shape
        scores = self.scratch.take("scores", (n, r, sum(sizes)), self.dtype)
        by_head = scores.view(self.batch, self.kv_heads, self.group, num_queries, -1)
        first = 0
        for size, tile_set in zip(sizes, tile_sets, strict=True):
            self.scratch.bmm_into(
                scores[..., first : first + size], tile_set.q_nrp, tile_set.k_nsp.transpose(1, 2), self.scale
            )
            for begin, end in tile_set.masked:
                by_head[..., first + begin : first + end] += tile_set.mask[..., begin:end]
            first += size
        torch.softmax(scores, -1, out=scores)
        return list(scores.to(tile_sets[0].v_nsp.dtype).split(sizes, -1))


def set_masses(
    sets: tuple[Tensor, ...], index_bjm: Tensor | None, doc_ids_bt: Tensor | None, geometry: Geometry
) -> Tensor:
    """Sums of the probabilities over window, fading and eidetic keys, averaged over heads, [b, t, 3]."""
    operands = Operands(sets, index_bjm, doc_ids_bt, geometry)
    batch = operands.batch
    mass_bt3 = sets[0].new_zeros(batch, geometry.num_queries, 3)
    column = {0: 0, geometry.window_size: 1, None: 2}
    for chunk, start, end in geometry.tiles():
        tile_sets = operands.tile(chunk, start, end)
        for tile_set, prob in zip(tile_sets, operands.probabilities(tile_sets, end - start), strict=True):
            by_head = prob.sum(-1).view(batch, -1, end - start)
            mass_bt3[:, start:end, column[tile_set.age]] = by_head.mean(1)
    return mass_bt3


@lru_cache(maxsize=256)
def band(num_queries: int, num_keys: int, shift: int, span: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask: 0 where 0 <= distance < span, query r standing at r and key s at s + shift."""
    distance = torch.arange(num_queries, device=device)[:, None] - (torch.arange(num_keys, device=device) + shift)
    return additive((distance >= 0) & (distance < span), dtype)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def rows_of(x_ngtp: Tensor, start: int, end: int) -> Tensor:
    n, g, _, p = x_ngtp.shape
    return x_ngtp[:, :, start:end].reshape(n, g * (end - start), p)


def gather_rows(x_nsp: Tensor, rows_nm: Tensor) -> Tensor:
    flat = x_nsp.view(-1, x_nsp.shape[-1])
    return flat.index_select(0, rows_nm.flatten()).view(*rows_nm.shape, -1)


def add_product(into_nsp: Tensor, rows: slice | Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """into[rows] += scale * a b."""
    if isinstance(rows, slice):
        target = into_nsp[:, rows]
        torch.baddbmm(target, a, b, alpha=scale, out=target)
    else:
        into_nsp.view(-1, into_nsp.shape[-1]).index_add_(0, rows.flatten(), torch.bmm(a, b).flatten(0, 1), alpha=scale)
