"""Where the operands of chunked.py lie: the block of keys and values that its tiles read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_TILE = 128
KEY_ALIGNMENT = 16  # a tile reads up to 15 places more, masked, so that rows of scores start on cache lines


@dataclass(frozen=True)
class Geometry:
    """The static part of a call: which keys meet which queries. Positions count from the first query's."""

    num_queries: int
    window_size: int
    chunk_size: int
    num_past: int


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
    """The sizes of a call, and where its keys are put."""

    geometry: Geometry
    batch: int
    kv_heads: int
    group: int
    window_rows: int
    fading_rows: int
    eidetic_rows: int
    slots: int
    dtype: torch.dtype  # of scores

    @classmethod
    def of(cls, geometry: Geometry, index_bjm: Tensor | None, inputs: tuple[Tensor | None, ...]) -> Layout:
        q, k, _, fading_k, _, _, eidetic_k, _ = inputs
        assert q is not None
        assert k is not None
        window_rows, fading_rows, eidetic_rows = (0 if x is None else x.shape[1] for x in (k, fading_k, eidetic_k))
        slots = 0 if index_bjm is None else index_bjm.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        sizes = {"batch": k.shape[0], "kv_heads": k.shape[2], "group": q.shape[2] // k.shape[2], "slots": slots}
        rows = {"window_rows": window_rows, "fading_rows": fading_rows, "eidetic_rows": eidetic_rows}
        return cls(geometry, dtype=dtype, **sizes, **rows)

    @property
    def sets(self) -> int:
        """Window alone, or with the fading memory."""
        return 2 if self.fading_rows else 1

    @property
    def begin(self) -> int:
        """Position of place 0."""
        return self.geometry.num_queries - self.window_rows

    @property
    def fading_from(self) -> int:
        """Position of the first place that has a fading row beside it."""
        beside_oldest = self.geometry.num_queries - self.fading_rows
        return max(beside_oldest, self.geometry.window_size - self.geometry.num_past)

    def fading_places(self) -> tuple[slice, slice]:
        """Places that have a fading row beside them, and those rows."""
        first = min(max(0, self.fading_from - self.begin), self.window_rows)
        first_row = self.begin + first - (self.geometry.num_queries - self.fading_rows)
        return slice(first, self.window_rows), slice(first_row, first_row + self.window_rows - first)

    def tiles(self) -> Iterator[Tile]:
        """Every tile, in order; a tile never crosses a chunk boundary."""
        geometry = self.geometry
        for chunk, chunk_start in enumerate(range(0, geometry.num_queries, geometry.chunk_size)):
            chunk_end = min(chunk_start + geometry.chunk_size, geometry.num_queries)
            for start in range(chunk_start, chunk_end, QUERY_TILE):
                end = min(start + QUERY_TILE, chunk_end)
                oldest = start - geometry.window_size + 1
                first = max(-geometry.num_past, oldest - oldest % KEY_ALIGNMENT, self.begin)
                sets = self.sets if end > self.fading_from else 1
                yield Tile(chunk, start, end, first - self.begin, end - self.begin, sets)

    def scores_bytes(self) -> int:
        rows = self.batch * self.kv_heads * self.group
        return rows * sum((t.end - t.start) * (t.near + self.slots) for t in self.tiles()) * self.dtype.itemsize

    def heads_first(self, x_bshp: Tensor, group: int = 1) -> Tensor:
        """[b, s, h, p] to [n, g, s, p], contiguous; without a copy where it lies so in memory."""
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


def lay_out(
    layout: Layout, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What Operands are made of."""
    q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    q_ngtp = layout.heads_first(q, layout.group)
    kv_2njzp = k.new_empty(
        2, layout.batch * layout.kv_heads, layout.window_rows + layout.slots, layout.sets, k.shape[3]
    )
    lay_beside(layout, kv_2njzp[0], k, fading_k)
    lay_beside(layout, kv_2njzp[1], v, fading_v)
    docs_b1jz = None if doc_ids_bt is None else docs_beside(layout, doc_ids_bt)
    if index_bjm is None or eidetic_q is None or eidetic_k is None:
        return q_ngtp, kv_2njzp, doc_ids_bt, docs_b1jz, None, None, None, None
    head_n = torch.arange(layout.batch * layout.kv_heads, device=k.device)[:, None, None] * layout.eidetic_rows
    index_njm = index_bjm.clamp_min(0).repeat_interleave(layout.kv_heads, 0) + head_n
    index_jnm = index_njm.transpose(0, 1).contiguous()  # into [n * s]
    eidetic_kv = (eidetic_k, v if eidetic_v is None else eidetic_v)
    slots_j2nmp = torch.stack([gather(x_bshp, index_jnm) for x_bshp in eidetic_kv], 1)
    empty_bjm = additive(index_bjm >= 0, layout.dtype)
    eidetic_q_ngtp = layout.heads_first(eidetic_q, layout.group)
    return q_ngtp, kv_2njzp, doc_ids_bt, docs_b1jz, eidetic_q_ngtp, slots_j2nmp, index_jnm, empty_bjm


def lay_beside(layout: Layout, into_njzp: Tensor, x_bshp: Tensor, fading_bshp: Tensor | None) -> None:
    """Window rows, each with the fading row of W before beside it, zeros where there is none."""
    into_bhjzp = into_njzp.view(layout.batch, layout.kv_heads, *into_njzp.shape[1:])
    into_bhjzp[:, :, : layout.window_rows, 0] = x_bshp.transpose(1, 2)
    if fading_bshp is not None:
        places, fading = layout.fading_places()
        into_bhjzp[:, :, : places.start, 1] = 0
        into_bhjzp[:, :, places, 1] = fading_bshp.transpose(1, 2)[:, :, fading]


def docs_beside(layout: Layout, doc_ids_bt: Tensor) -> Tensor:
    """[b, 1, j, z]: the document of each key; no document (-2) where there is no key."""
    docs = doc_ids_bt.new_full((layout.batch, 1, layout.window_rows, layout.sets), -2)
    docs[:, 0, :, 0] = doc_ids_bt
    if layout.sets == 2:
        places, _ = layout.fading_places()
        w = layout.geometry.window_size
        docs[:, 0, places, 1] = doc_ids_bt[:, places.start - w : places.stop - w]
    return docs


def gather(x_bshp: Tensor, index_jnm: Tensor) -> Tensor:
    """The slots of every chunk, [chunks, n, m, p]."""
    rows = x_bshp.transpose(1, 2).reshape(-1, x_bshp.shape[3])
    return rows.index_select(0, index_jnm.flatten()).view(*index_jnm.shape, -1)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
