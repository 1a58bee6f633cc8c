"""Which positions each chunk keeps verbatim: the running top M by innovation. Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.innovation_select.chunked import innovation_select_chunked, keep_best
from kernels.innovation_select.reference import innovation_select_reference

__all__ = ["innovation_select", "innovation_select_reference", "keep_best"]


def innovation_select(
    log_innovation_bs: Tensor,
    position_bs: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    tau: float | None = None,
    doc_ids_bs: Tensor | None = None,
    start: int = 0,
    num_slots: int = 0,
) -> Tensor:
    """The eidetic set of every chunk of queries: S_j = the M highest-ranked positions i <= jC - W of the document that
    holds position jC, ranked by log e_i + i / tau, ties to the earlier position (DESIGN 3). No gradient passes.

    Rows are, in this order: `num_slots` already kept, positions just before `start`, and `num_queries` from `start` on.

    Args:
        log_innovation_bs: log e_i of each row; finite.
        position_bs: position of each row, consecutive after the slots; negative marks a row that holds none.
        num_queries: rows that are queries; they are the last ones.
        chunk_size: positions between updates [C]. Updates happen at its multiples.
        window_size: positions still in the window are no candidates [W]; at least chunk_size.
        num_eidetic: size of a set [M]; at least num_slots.
        tau: forgetting time in tokens; None: old and new innovations weigh the same.
        doc_ids_bs: document of each row. None: all rows are one document.
        start: position of the first query: a multiple of chunk_size, or else all queries are in one chunk.
        num_slots: rows at the front that hold the set in force before `start`, best first.
    Returns: int64 [b, chunks, m]: rows, best first, -1 where the set has fewer than M.
    Raises: ValueError: queries from within a chunk reach over its end.
    """
    if start % chunk_size and start % chunk_size + num_queries > chunk_size:
        raise ValueError(
            f"{num_queries} queries from position {start} cross a chunk boundary (chunk_size={chunk_size}); "
            "split them there."
        )
    by_definition = dispatch.chosen(log_innovation_bs) == "reference"
    select = innovation_select_reference if by_definition else innovation_select_chunked
    return select(
        log_innovation_bs, position_bs, num_queries=num_queries, chunk_size=chunk_size, window_size=window_size,
        num_eidetic=num_eidetic, tau=tau, doc_ids_bs=doc_ids_bs, start=start, num_slots=num_slots,
    )  # fmt: skip
