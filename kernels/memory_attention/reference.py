"""Memory attention's inputs, and its meaning: dense scores over every key, masks from the definition, one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operator import Path


class KeysValues(NamedTuple):
    """Keys, rotated, and values of the fading memory: [b, s, h, p], or ring buffers [b, r, h, p]."""

    k: Tensor
    v: Tensor


class Eidetic(NamedTuple):
    """The eidetic set: queries and keys rotated for the constant distance of the slots.

    index_bjm: for each chunk j of queries the m rows it reads; -1 marks an empty slot.
    """

    q_bthp: Tensor
    k_bshp: Tensor
    v_bshp: Tensor
    index_bjm: Tensor


class AttentionInputs(NamedTuple):
    """Attend from t queries to three sets of keys and values under one softmax (docs/model.md).

    Args:
        q_bthp: queries, rotated to their positions. h is a multiple of the key/value heads (grouped-query attention).
        k_bshp, v_bshp: window keys (rotated) and values. The last t rows are the queries' own positions, those before
            them the positions just before; query t reads the window_size rows up to and including its own.
        fading: query t reads the window_size positions before its window. The last row is that of window_size
            positions before the last query: no query reads a later one.
        eidetic: the slots that each chunk of queries reads.
        window_size: positions a query sees in the window, its own included [W]; None: all.
        chunk_size: queries that share one row of index_bjm [C]; counted from the first query.
        doc_ids_bt: document of each position; queries read their own document only. Only without past rows. The slots
            of a chunk belong to the document its first query is in.
        num_past: positions before the first query; rows further back than that are not read.
    Returns: [b, t, h, p] in the dtype of v; the softmax is in float32 (float64 for float64 inputs).
    Raises: ValueError: shapes that do not fit together.
    """

    q_bthp: Tensor
    k_bshp: Tensor
    v_bshp: Tensor
    fading: KeysValues | None = None
    eidetic: Eidetic | None = None
    window_size: int | None = None
    chunk_size: int | None = None
    doc_ids_bt: Tensor | None = None
    num_past: int = 0


class Slots(NamedTuple):
    """The eidetic set of a decoding state, rotated as in Eidetic; position_bm: of each slot, -1 if it is empty."""

    q_bhp: Tensor
    k_bmhp: Tensor
    v_bmhp: Tensor
    position_bm: Tensor


class StepInputs(NamedTuple):
    """Attend from one query per row to the decoding state's three sets, under one softmax. No gradient passes.

    Keys and values of positions lie in ring buffers, position i in slot i mod r.

    Args:
        q_bhp: queries, rotated to position_b.  k_brhp, v_brhp: ring buffers of the window, keys rotated.
        position_b: the newest position in the ring buffers.
        fading: ring buffers likewise, read at the window_size positions before the window.
        eidetic: the slots, and queries rotated for them.
        window_size: positions a query sees in the window, its own included [W]; None: all that the ring holds.
    Returns: [b, h, p] in the dtype of q; the softmax is in float32 (float64 for float64 inputs).
    """

    q_bhp: Tensor
    k_brhp: Tensor
    v_brhp: Tensor
    position_b: Tensor
    fading: KeysValues | None = None
    eidetic: Slots | None = None
    window_size: int | None = None


class FlatInputs(NamedTuple):
    """AttentionInputs for autograd and torch.library: tensors first, sets that are absent as None.

    eidetic_v: None if the slots read the window's values.  scale: of the scores, before the softmax.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    fading_k: Tensor | None
    fading_v: Tensor | None
    eidetic_q: Tensor | None
    eidetic_k: Tensor | None
    eidetic_v: Tensor | None
    index_bjm: Tensor | None
    doc_ids_bt: Tensor | None
    window_size: int
    chunk_size: int
    num_past: int
    scale: float

    @classmethod
    def of(cls, inputs: AttentionInputs) -> FlatInputs:
        """The values of the slots are given once if they are the window's: their gradients then add up."""
        q, k, v, fading, eidetic, window_size, chunk_size, doc_ids_bt, num_past = inputs
        fading_k, fading_v = fading or (None, None)
        eidetic_q, eidetic_k, eidetic_v, index = (None,) * 4 if eidetic is None or not eidetic[3].shape[2] else eidetic
        eidetic_v = None if eidetic_v is v else eidetic_v
        numbers = (window_size or k.shape[1], chunk_size or q.shape[1], num_past, q.shape[-1] ** -0.5)
        sets = (q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v)
        return cls(*sets, index, doc_ids_bt, *numbers)

    @classmethod
    def from_saved(cls, tensors: Sequence[Tensor | None], numbers: Sequence[int | float]) -> FlatInputs:
        """The reverse of `tensors` and `numbers`."""
        return cls._make((*tensors, *numbers))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Inputs up to doc_ids_bt."""
        return self[:10]

    @property
    def sets(self) -> tuple[Tensor | None, ...]:
        """Inputs that have a gradient: queries, keys and values."""
        return self[:8]

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """Inputs after doc_ids_bt."""
        return self[10:]

    @property
    def num_queries(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def num_slots(self) -> int:
        return 0 if self.index_bjm is None else self.index_bjm.shape[2]


def check(inputs: AttentionInputs) -> None:
    """Raise ValueError if rows, chunks or documents do not fit the queries."""
    q_bthp, k_bshp, _, fading, eidetic, window_size, chunk_size, doc_ids_bt, num_past = inputs
    num_queries, num_rows = q_bthp.shape[1], k_bshp.shape[1]
    window_size = window_size or num_rows
    rows_needed = num_queries + min(num_past, window_size - 1)
    if num_rows < rows_needed:
        raise ValueError(f"{num_rows} key rows, but {num_queries} queries read {rows_needed} with those before them.")
    if fading is not None and fading[0].shape[1] < num_queries - window_size:
        raise ValueError(
            f"{fading[0].shape[1]} fading rows, but {num_queries} queries with window_size {window_size} read "
            f"{num_queries - window_size} of their own positions."
        )
    if doc_ids_bt is not None and (num_past or num_rows != num_queries):
        raise ValueError(f"doc_ids_bt needs as many key rows ({num_rows}) as queries ({num_queries}), and no past.")
    if eidetic is not None and (chunk_size is None or eidetic[3].shape[1] * chunk_size < num_queries):
        raise ValueError(f"index_bjm has {eidetic[3].shape[1]} chunks of {chunk_size} for {num_queries} queries.")


def _run(inputs: AttentionInputs) -> Tensor:
    """Time and memory grow with t x s: for small inputs."""
    q_bthp, k_bshp, v_bshp, fading, eidetic, window_size, chunk_size, doc_ids_bt, num_past = inputs
    num_queries, h = q_bthp.shape[1:3]
    window_size = window_size or k_bshp.shape[1]
    t = torch.arange(num_queries, device=q_bthp.device)
    scores, values = [], []

    def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> None:
        """k, v: [b, s, kv heads, p], or [b, t, s, kv heads, p] if each query has keys of its own."""
        groups = h // k.shape[-2]
        k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
        per_query = "bthp,bthsp->bhts" if k.dim() == 5 else "bthp,bhsp->bhts"
        score = torch.einsum(per_query, q, k.transpose(-3, -2)) * q.shape[-1] ** -0.5
        scores.append(score.masked_fill(~allowed, float("-inf")))
        values.append(v if v.dim() == 5 else v[:, None].expand(-1, num_queries, -1, -1, -1))

    def local(k: Tensor, v: Tensor, age: int) -> None:
        position = torch.arange(k.shape[1], device=k.device) - (k.shape[1] - num_queries) - age
        distance = t[:, None] - position[None, :]
        allowed = (distance >= age) & (distance < age + window_size) & (position >= -num_past)
        allowed = allowed[None, None]
        if doc_ids_bt is not None:
            allowed = allowed & (doc_ids_bt[:, None, :, None] == doc_ids_bt[:, None, None, position.clamp_min(0)])
        attend(q_bthp, k, v, allowed)

    local(k_bshp, v_bshp, 0)
    if fading is not None:
        local(*fading, window_size)
    if eidetic is not None and eidetic[3].shape[2]:
        assert chunk_size is not None
        q, k, v, index_bjm = eidetic
        index_btm = index_bjm[:, t // chunk_size]
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        rows = index_btm.clamp_min(0)
        allowed = (index_btm >= 0)[:, None]
        if doc_ids_bt is not None:
            of_chunk_bt = doc_ids_bt[:, t // chunk_size * chunk_size]
            allowed = allowed & (doc_ids_bt == of_chunk_bt)[:, None, :, None]
        attend(q, k[batch, rows], v[batch, rows], allowed)
    probs = torch.softmax(torch.cat(scores, -1), -1)
    return torch.einsum("bhts,btshp->bthp", probs, torch.cat(values, 2))


memory_attention = Path(_run)


def example() -> AttentionInputs:
    """A small call with all three sets and documents."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(2, 13, 4, 8), normal(2, 13, 2, 8), normal(2, 13, 2, 8)
    fading = KeysValues(normal(2, 8, 2, 8), normal(2, 8, 2, 8))
    index = torch.tensor([[[-1, -1], [1, -1]], [[-1, -1], [2, 0]]])
    eidetic = Eidetic(normal(2, 13, 4, 8), normal(2, 13, 2, 8), v, index)
    docs = torch.tensor([[0] * 13, [0] * 5 + [1] * 8])
    return AttentionInputs(q, k, v, fading, eidetic, window_size=5, chunk_size=7, doc_ids_bt=docs)


def example_step() -> StepInputs:
    """One step of two rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, 8, generator=generator)

    fading = KeysValues(normal(10, 2), normal(10, 2))
    slots = Slots(normal(4), normal(3, 2), normal(3, 2), torch.tensor([[4, -1, 0], [-1, -1, -1]]))
    return StepInputs(normal(4), normal(7, 2), normal(7, 2), torch.tensor([12, 3]), fading, slots, window_size=5)
