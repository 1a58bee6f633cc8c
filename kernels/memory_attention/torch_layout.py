"""Layout of the keys and values that the tiles of torch_tiles.py read: one block of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory_attention.reference import FlatInputs

QUERY_TILE = 128
KEY_ALIGNMENT = 16  # a tile reads up to 15 places more, masked, so that rows of scores start on cache lines


@dataclass(frozen=True)
class Tile:
    """Queries [start, end) of a chunk and the places [first, last) of the block they read, of z sets each."""

    chunk: int
    start: int
    end: int
    first: int
    last: int
    sets: int

    @property
    def near(self) -> int:
        """Columns of scores before those of the slots."""
        return (self.last - self.first) * self.sets


@dataclass(frozen=True)
class Layout:
    """The sizes of a call, and the places of its keys. Positions count from the first query's."""

    num_queries: int
    window_size: int
    chunk_size: int
    num_past: int
    scale: float
    batch: int
    kv_heads: int
    group: int
    window_rows: int
    fading_rows: int
    eidetic_rows: int
    slots: int
    dtype: torch.dtype  # of scores

    @classmethod
    def of(cls, inputs: FlatInputs) -> Layout:
        rows = [0 if x is None else x.shape[1] for x in (inputs.k, inputs.fading_k, inputs.eidetic_k)]
        window_rows, fading_rows, eidetic_rows = rows
        return cls(
            num_queries=inputs.num_queries,
            window_size=inputs.window_size,
            chunk_size=inputs.chunk_size,
            num_past=inputs.num_past,
            scale=inputs.scale,
            batch=inputs.k.shape[0],
            kv_heads=inputs.k.shape[2],
            group=inputs.group,
            window_rows=window_rows,
            fading_rows=fading_rows,
            eidetic_rows=eidetic_rows,
            slots=inputs.num_slots,
            dtype=torch.promote_types(inputs.q.dtype, torch.float32),
        )

    @property
    def sets(self) -> int:
        """Window alone, or with the fading memory."""
        return 2 if self.fading_rows else 1

    @property
    def begin(self) -> int:
        """Position of place 0."""
        return self.num_queries - self.window_rows

    @property
    def fading_from(self) -> int:
        """Position of the first place that has a fading row beside it."""
        beside_oldest = self.num_queries - self.fading_rows
        return max(beside_oldest, self.window_size - self.num_past)

    def fading_places(self) -> tuple[slice, slice]:
        """Places that have a fading row beside them, and those rows."""
        first = min(max(0, self.fading_from - self.begin), self.window_rows)
        first_row = self.begin + first - (self.num_queries - self.fading_rows)
        return slice(first, self.window_rows), slice(first_row, first_row + self.window_rows - first)

    def tiles(self) -> Iterator[Tile]:
        """Every tile, in order; a tile never crosses a chunk boundary."""
        for chunk, chunk_start in enumerate(range(0, self.num_queries, self.chunk_size)):
            chunk_end = min(chunk_start + self.chunk_size, self.num_queries)
            for start in range(chunk_start, chunk_end, QUERY_TILE):
                end = min(start + QUERY_TILE, chunk_end)
                oldest = start - self.window_size + 1
                first = max(-self.num_past, oldest - oldest % KEY_ALIGNMENT, self.begin)
                sets = self.sets if end > self.fading_from else 1
                yield Tile(chunk, start, end, first - self.begin, end - self.begin, sets)

    def scores_bytes(self) -> int:
        rows = self.batch * self.kv_heads * self.group
        return rows * sum((t.end - t.start) * (t.near + self.slots) for t in self.tiles()) * self.dtype.itemsize

    def heads_first(self, x_bshp: Tensor, group: int = 1) -> Tensor:
        """[b, s, h, p] to [n, g, s, p], contiguous; without a copy if it lies so in memory."""
        b, s, h, p = x_bshp.shape
        return x_bshp.transpose(1, 2).contiguous().view(b * h // group, group, s, p)

    def time_first(self, x_ngsp: Tensor) -> Tensor:
        """[n, g, s, p] to [b, s, h, p]."""
        n, g, s, p = x_ngsp.shape
        return x_ngsp.reshape(self.batch, n * g // self.batch, s, p).transpose(1, 2)

    def put_rows(self, into_bthp: Tensor, tile: Tile, rows_nrp: Tensor) -> None:
        by_head = rows_nrp.view(self.batch, self.kv_heads * self.group, tile.end - tile.start, -1)
        into_bthp[:, tile.start : tile.end].copy_(by_head.transpose(1, 2))

    def block(self, kv_njzp: Tensor, tile: Tile, extra: int = 0) -> Tensor:
        """What the tile reads of keys or values, [n, (j z), p], and `extra` rows beyond."""
        if tile.sets < self.sets:
            return kv_njzp[:, tile.first : tile.last + extra, 0]
        flat = kv_njzp.flatten(1, 2)
        return flat[:, tile.first * self.sets : tile.last * self.sets + extra]


class LaidOut(NamedTuple):
    """The inputs as tiles read them; the last four are None without slots. n: batch x key/value heads.

    kv_2njzp: keys, then values.  docs_b1jz: document of each key.
    slots_j2nmp: keys, then values of each chunk's slots.  index_jnm: their rows.  empty_bjm: added to their scores.
    """

    q_ngtp: Tensor
    kv_2njzp: Tensor
    docs_bt: Tensor | None
    docs_b1jz: Tensor | None
    eidetic_q_ngtp: Tensor | None
    slots_j2nmp: Tensor | None
    index_jnm: Tensor | None
    empty_bjm: Tensor | None


def lay_out(layout: Layout, inputs: FlatInputs) -> LaidOut:
    k, index_bjm = inputs.k, inputs.index_bjm
    q_ngtp = layout.heads_first(inputs.q, layout.group)
    places = layout.window_rows + layout.slots
    kv_2njzp = k.new_empty(2, layout.batch * layout.kv_heads, places, layout.sets, k.shape[3])
    lay_beside(layout, kv_2njzp[0], k, inputs.fading_k)
    lay_beside(layout, kv_2njzp[1], inputs.v, inputs.fading_v)
    docs_b1jz = None if inputs.doc_ids_bt is None else docs_beside(layout, inputs.doc_ids_bt)
    near = (q_ngtp, kv_2njzp, inputs.doc_ids_bt, docs_b1jz)
    if index_bjm is None or inputs.eidetic_q is None or inputs.eidetic_k is None:
        return LaidOut(*near, None, None, None, None)
    head_n = torch.arange(layout.batch * layout.kv_heads, device=k.device)[:, None, None] * layout.eidetic_rows
    index_njm = index_bjm.clamp_min(0).repeat_interleave(layout.kv_heads, 0) + head_n
    index_jnm = index_njm.transpose(0, 1).contiguous()  # into [n * s]
    eidetic_kv = (inputs.eidetic_k, inputs.v if inputs.eidetic_v is None else inputs.eidetic_v)
    slots_j2nmp = torch.stack([gather(x_bshp, index_jnm) for x_bshp in eidetic_kv], 1)
    empty_bjm = additive(index_bjm >= 0, layout.dtype)
    eidetic_q_ngtp = layout.heads_first(inputs.eidetic_q, layout.group)
    return LaidOut(*near, eidetic_q_ngtp, slots_j2nmp, index_jnm, empty_bjm)


def lay_beside(layout: Layout, into_njzp: Tensor, x_bshp: Tensor, fading_bshp: Tensor | None) -> None:
    """Window rows, each with the fading row of W before beside it, zeros if there is none."""
    into_bhjzp = into_njzp.view(layout.batch, layout.kv_heads, *into_njzp.shape[1:])
    into_bhjzp[:, :, : layout.window_rows, 0] = x_bshp.transpose(1, 2)
    if fading_bshp is not None:
        places, fading = layout.fading_places()
        into_bhjzp[:, :, : places.start, 1] = 0
        into_bhjzp[:, :, places, 1] = fading_bshp.transpose(1, 2)[:, :, fading]


def docs_beside(layout: Layout, doc_ids_bt: Tensor) -> Tensor:
    """[b, 1, j, z]: the document of each key; no document (-2) if there is no key."""
    docs = doc_ids_bt.new_full((layout.batch, 1, layout.window_rows, layout.sets), -2)
    docs[:, 0, :, 0] = doc_ids_bt
    if layout.sets == 2:
        places, _ = layout.fading_places()
        w = layout.window_size
        docs[:, 0, places, 1] = doc_ids_bt[:, places.start - w : places.stop - w]
    return docs


def gather(x_bshp: Tensor, index_jnm: Tensor) -> Tensor:
    """The slots of every chunk, [chunks, n, m, p]."""
    rows = x_bshp.transpose(1, 2).reshape(-1, x_bshp.shape[3])
    return rows.index_select(0, index_jnm.flatten()).view(*index_jnm.shape, -1)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
