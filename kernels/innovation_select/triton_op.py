"""The selection's Triton path: limits, launches, and its registration with torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.innovation_select import triton_kernels, triton_scores
from kernels.launch import Launch, num_bytes
from kernels.tuning import require

MAX_SORTED = 4096  # lanes one program sorts: exchanging their ranks takes 32 KiB of shared memory
DTYPES = (torch.float32, torch.float64)


def innovation_select_triton(
    rank_bs: Tensor,
    position_bs: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    doc_ids_bs: Tensor | None = None,
    start: int = 0,
    num_slots: int = 0,
) -> Tensor:
    """See kernels.innovation_select. Raises ValueError: over MAX_SORTED slots or positions a chunk; other dtypes."""
    _check_dtype(rank_bs)
    _check_size("num_eidetic", num_eidetic)
    if start % chunk_size == 0:
        _check_size("chunk_size", chunk_size)
    docs_bs = None if doc_ids_bs is None else doc_ids_bs.contiguous()
    index_bjm: Tensor = torch.ops.bmojo.innovation_select(
        rank_bs.contiguous(), position_bs.contiguous(), docs_bs,
        num_queries, chunk_size, window_size, num_eidetic, start, num_slots,
    )  # fmt: skip
    return index_bjm


def keep_best_triton(rank_bc: Tensor, valid_bc: Tensor, num_eidetic: int) -> Tensor:
    """See kernels.innovation_select.keep_best. Raises ValueError: more than MAX_SORTED candidates; other dtypes."""
    _check_dtype(rank_bc)
    _check_size("the number of candidates", rank_bc.shape[1])
    best_bm: Tensor = torch.ops.bmojo.keep_best(rank_bc.contiguous(), valid_bc.contiguous(), num_eidetic)
    return best_bm


def _check_dtype(rank: Tensor) -> None:
    require(
        rank.dtype in DTYPES,
        f"innovation_select in Triton takes scores in float32 and float64, not {rank.dtype}.",
    )


def _check_size(name: str, size: int) -> None:
    require(
        size <= MAX_SORTED,
        f"innovation_select in Triton sorts at most {MAX_SORTED} rows at a time, but {name} is {size}; "
        "use BMOJO_KERNELS=torch.",
    )


@torch.library.custom_op("bmojo::innovation_select", mutates_args=())
def innovation_select_op(
    rank_bs: Tensor,
    position_bs: Tensor,
    doc_ids_bs: Tensor | None,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    start: int,
    num_slots: int,
) -> Tensor:
    index_bjm = _index(rank_bs, num_queries, chunk_size, num_eidetic)
    if index_bjm.numel():
        for launch in plan_select(
            rank_bs, position_bs, doc_ids_bs, index_bjm, num_queries=num_queries, chunk_size=chunk_size,
            window_size=window_size, start=start, num_slots=num_slots,
        ):  # fmt: skip
            launch.run()
    return index_bjm


@innovation_select_op.register_fake
def _(
    rank_bs: Tensor,
    position_bs: Tensor,
    doc_ids_bs: Tensor | None,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    start: int,
    num_slots: int,
) -> Tensor:
    return _index(rank_bs, num_queries, chunk_size, num_eidetic)


@torch.library.custom_op("bmojo::keep_best", mutates_args=())
def keep_best_op(rank_bc: Tensor, valid_bc: Tensor, num_eidetic: int) -> Tensor:
    index_bm = _best(rank_bc, valid_bc, num_eidetic)
    if index_bm.numel():
        for launch in plan_best(rank_bc, valid_bc, index_bm):
            launch.run()
    return index_bm


@keep_best_op.register_fake
def _best(rank_bc: Tensor, valid_bc: Tensor, num_eidetic: int) -> Tensor:
    batch, candidates = rank_bc.shape
    return torch.empty(batch, min(num_eidetic, candidates), dtype=torch.int64, device=rank_bc.device)


def plan_select(
    rank_bs: Tensor,
    position_bs: Tensor,
    doc_ids_bs: Tensor | None,
    index_bjm: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    start: int,
    num_slots: int,
) -> list[Launch]:
    """Sort what leaves the window at each boundary, in parallel; then merge along the chunks. Queries from within a
    chunk have the slots alone."""
    batch, chunks, num_eidetic = index_bjm.shape
    num_rows = rank_bs.shape[1]
    kept_lanes, chunk_lanes = _lanes(num_eidetic), _lanes(chunk_size)
    num_leavers = min(kept_lanes, chunk_lanes) if start % chunk_size == 0 else 0
    shape, device = (batch, chunks, num_leavers), rank_bs.device
    leavers = {
        "rank_bjl": torch.empty(shape, dtype=rank_bs.dtype, device=device),
        "row_bjl": torch.empty(shape, dtype=torch.int32, device=device),
    }
    scores = {"rank_bs": rank_bs, "position_bs": position_bs, "doc_ids_bs": doc_ids_bs}
    sizes = {"num_rows": num_rows, "num_chunks": chunks, "first_boundary": num_rows - num_queries}
    constants = {"CHUNK": chunk_size}
    sort = Launch(
        triton_kernels.leavers_kernel,
        grid=(chunks, batch),
        args={**scores, **leavers, **sizes, "first_row": num_slots},
        constants={**constants, "WINDOW": window_size, "KEPT": num_leavers, **_list_of(chunk_lanes)},
        num_warps=_num_warps(chunk_lanes),
        bytes=num_bytes(*scores.values(), *leavers.values()),
    )
    merge = Launch(
        triton_kernels.merge_kernel,
        grid=(batch,),
        args={**scores, **leavers, **sizes, "num_slots": num_slots, "num_eidetic": num_eidetic, "index_bjm": index_bjm},
        constants={**constants, "LEAVERS": num_leavers, **_list_of(kept_lanes)},
        num_warps=_num_warps(kept_lanes),
        bytes=num_bytes(*leavers.values(), index_bjm),
    )
    return [sort, merge] if num_leavers else [merge]


def plan_best(rank_bc: Tensor, valid_bc: Tensor, index_bm: Tensor) -> list[Launch]:
    """The launch that orders the candidates of each batch element."""
    batch, candidates = rank_bc.shape
    lanes = _lanes(candidates)
    tensors = {"rank_bc": rank_bc, "valid_bc": valid_bc, "index_bm": index_bm}
    return [
        Launch(
            triton_kernels.best_kernel,
            grid=(batch,),
            args={**tensors, "num_candidates": candidates, "num_eidetic": index_bm.shape[1]},
            constants=_list_of(lanes),
            num_warps=_num_warps(lanes),
            bytes=num_bytes(*tensors.values()),
        )
    ]


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: batch 8, 4096 tokens, d 2048, 4 taps, C 256, W 512, M 128."""
    rank_bs = torch.empty(8, 4096, device="meta")
    position_bs = torch.empty(8, 4096, dtype=torch.int64, device="meta")
    index_bjm = _index(rank_bs, 4096, 256, 128)
    sizes = {"num_queries": 4096, "chunk_size": 256, "window_size": 512, "start": 0, "num_slots": 0}
    cases = triton_scores.report_cases(arch)
    for name, docs_bs, ranks_bs in (
        ("select", None, rank_bs),
        ("select, documents, tau", position_bs, rank_bs.double()),
    ):
        cases.append((name, plan_select(ranks_bs, position_bs, docs_bs, index_bjm, **sizes)))
    candidates = (rank_bs[:, :384], position_bs[:, :384].bool(), position_bs[:, :128])
    cases.append(("keep_best", plan_best(*candidates)))
    return cases


def _index(rank_bs: Tensor, num_queries: int, chunk_size: int, num_eidetic: int) -> Tensor:
    chunks = -(-num_queries // chunk_size)
    shape = (rank_bs.shape[0], chunks, num_eidetic)
    return torch.empty(shape, dtype=torch.int64, device=rank_bs.device)


def _lanes(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _list_of(lanes: int) -> dict[str, int]:
    return {"LANES": lanes, "LOG_LANES": lanes.bit_length() - 1}


def _num_warps(lanes: int) -> int:
    """Two lanes a thread: a sort is a chain of exchanges, short of parallel work."""
    return min(16, max(1, lanes // 64))
