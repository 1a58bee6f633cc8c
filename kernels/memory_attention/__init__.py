"""B'MOJO attention: one softmax over window, fading and eidetic keys. Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.memory_attention.chunked import MemoryAttention, set_masses
from kernels.memory_attention.cpp_op import MemoryAttentionCpp, memory_attention_step_cpp
from kernels.memory_attention.layout import Geometry
from kernels.memory_attention.reference import memory_attention_reference
from kernels.memory_attention.step import memory_attention_step_torch

__all__ = ["attention_mass", "memory_attention", "memory_attention_reference", "memory_attention_step"]


def memory_attention(
    q_bthp: Tensor,
    k_bshp: Tensor,
    v_bshp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    chunk_size: int | None = None,
    doc_ids_bt: Tensor | None = None,
    num_past: int = 0,
) -> Tensor:
    """Attend from t queries to three sets of keys and values under one softmax (docs/model.md).

    Args:
        q_bthp: queries, rotated to their positions. h is a multiple of the key/value heads (grouped-query attention).
        k_bshp, v_bshp: window keys (rotated) and values. The last t rows are the queries' own positions, those before
            them the positions just before; query t reads the window_size rows up to and including its own.
        fading: (k_bshp, v_bshp), keys rotated; query t reads the window_size positions before its window. The last row
            is that of window_size positions before the last query: no query reads a later one.
        eidetic: (q_bthp, k_bshp, v_bshp, index_bjm): queries and keys rotated for the constant distance of the slots,
            and for each chunk j of queries the m rows it reads, -1 marking an empty slot.
        window_size: positions a query sees in the window, its own included [W].
        chunk_size: queries that share one row of index_bjm [C]; counted from the first query.
        doc_ids_bt: document of each position; queries read their own document only. Only without past rows. The slots
            of a chunk belong to the document its first query is in.
        num_past: positions there are before the first query; rows further back than that are not read.
    Returns: [b, t, h, p] in the dtype of v; the softmax is in float32 (float64 for float64 inputs).
    Raises: ValueError: shapes that do not fit together.
    """
    num_queries, num_rows = q_bthp.shape[1], k_bshp.shape[1]
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
    if eidetic is not None and eidetic[3].shape[2] == 0:
        eidetic = None
    path = dispatch.chosen(q_bthp)
    if path == "triton":
        from kernels.memory_attention.triton_op import memory_attention_triton

        return memory_attention_triton(
            q_bthp, k_bshp, v_bshp, fading, eidetic,
            window_size=window_size, chunk_size=chunk_size, doc_ids_bt=doc_ids_bt, num_past=num_past,
        )  # fmt: skip
    if path == "reference":
        return memory_attention_reference(
            q_bthp, k_bshp, v_bshp, fading, eidetic,
            window_size=window_size, chunk_size=chunk_size, doc_ids_bt=doc_ids_bt, num_past=num_past,
        )  # fmt: skip
    geometry = Geometry(num_queries, window_size, chunk_size or num_queries, num_past)
    index_bjm = None if eidetic is None else eidetic[3]
    attend = MemoryAttentionCpp if path == "cpp" else MemoryAttention
    out_bthp: Tensor = attend.apply(geometry, index_bjm, doc_ids_bt, *_flat(q_bthp, k_bshp, v_bshp, fading, eidetic))
    return out_bthp


def memory_attention_step(
    q_bhp: Tensor,
    k_brhp: Tensor,
    v_brhp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    position_b: Tensor,
) -> Tensor:
    """Attend from one query a row to the decoding state's three sets, under one softmax. No gradient passes.

    Keys and values of positions lie in ring buffers, position i in slot i mod r; position_b is the newest one there.

    Args:
        q_bhp: queries, rotated to position_b.  k_brhp, v_brhp: ring buffers of the window, keys rotated.
        fading: (k_brhp, v_brhp), ring buffers likewise, read at the window_size positions before the window.
        eidetic: (q_bhp, k_bmhp, v_bmhp, position_bm): queries and keys rotated for the constant distance of the slots,
            and the position each slot holds, -1 marking an empty one.
        window_size: positions a query sees in the window, its own included [W]; no more than the ring holds are read.
    Returns: [b, h, p] in the dtype of q; the softmax is in float32 (float64 for float64 inputs).
    """
    path = dispatch.chosen(q_bhp)
    step = memory_attention_step_cpp if path == "cpp" else memory_attention_step_torch
    if path == "triton":
        from kernels.memory_attention.triton_step import memory_attention_step_triton as step
    return step(q_bhp, k_brhp, v_brhp, fading, eidetic, window_size=window_size, position_b=position_b)


@torch.no_grad()
def attention_mass(
    q_bthp: Tensor,
    k_bshp: Tensor,
    v_bshp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    chunk_size: int | None = None,
    doc_ids_bt: Tensor | None = None,
    num_past: int = 0,
) -> Tensor:
    """How much attention goes to window, fading and eidetic memory: [b, t, 3], summing to 1, the mean over heads.

    Arguments as for memory_attention.
    """
    num_queries = q_bthp.shape[1]
    geometry = Geometry(num_queries, window_size, chunk_size or num_queries, num_past)
    index_bjm = None if eidetic is None else eidetic[3]
    return set_masses(geometry, index_bjm, doc_ids_bt, _flat(q_bthp, k_bshp, v_bshp, fading, eidetic))


def _flat(
    q_bthp: Tensor,
    k_bshp: Tensor,
    v_bshp: Tensor,
    fading: tuple[Tensor, Tensor] | None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """The inputs of MemoryAttention. Eidetic values that are the window's are given once: their gradients add up."""
    if eidetic is None:
        return q_bthp, k_bshp, v_bshp, *(fading or (None, None)), None, None, None
    q, k, v, _ = eidetic
    return q_bthp, k_bshp, v_bshp, *(fading or (None, None)), q, k, None if v is v_bshp else v
