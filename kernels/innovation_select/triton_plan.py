"""The launches of innovation scores and of the selection, planned from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import ARCHITECTURES, INTERPRETER, Config
from kernels.innovation_select import triton_kernels
from kernels.innovation_select.reference import EPS, ScoreInputs

# A thread holds 8 channels of one row, 16 bytes per load of bf16: about 60 registers with the rows its taps meet
# (twice as many channels spilled). Taller blocks read fewer rows of their neighbours again, from the L2 cache.
_GPU = (
    Config({"BLOCK_T": 32, "BLOCK_D": 64}, num_warps=8),
    Config({"BLOCK_T": 64, "BLOCK_D": 64}, num_warps=16),
    Config({"BLOCK_T": 16, "BLOCK_D": 64}, num_warps=4),
)
CONFIGS: dict[str, tuple[Config, ...]] = {
    **dict.fromkeys(ARCHITECTURES, _GPU),
    INTERPRETER: (Config({"BLOCK_T": 8, "BLOCK_D": 32}),),
}
BLOCKS_PER_SEGMENT = 8  # of the backward, which writes one share of the weight's gradient per segment


def plan_scores(inputs: ScoreInputs, error_bt: Tensor, energy_bt: Tensor, config: Config) -> list[Launch]:
    """The launch that reads y once and writes every position's score."""
    batch, t, _ = inputs.y_btd.shape
    args = _args(inputs) | {"error_bt": error_bt, "energy_bt": energy_bt}
    return [
        Launch(
            triton_kernels.scores_kernel,
            grid=(batch * -(-t // config.tiles["BLOCK_T"]),),
            args={**args, "eps": EPS},
            constants={"TAPS": inputs.weight_kd.shape[0], **config.tiles},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            bytes=num_bytes(*(x for x in args.values() if isinstance(x, Tensor))),
        )
    ]


def plan_scores_backward(inputs: ScoreInputs, energy_bt: Tensor, grad_error_bt: Tensor, config: Config) -> list[Launch]:
    """The launch that writes every segment's share of the weight's gradient, args["grad_weight_skd"]."""
    batch, t, channels = inputs.y_btd.shape
    taps, segment = inputs.weight_kd.shape[0], BLOCKS_PER_SEGMENT * config.tiles["BLOCK_T"]
    segments = batch * -(-t // segment)
    shares_skd = torch.empty(segments, taps, channels, dtype=torch.float32, device=inputs.y_btd.device)
    args = _args(inputs)
    args |= {"energy_bt": energy_bt, "grad_error_bt": grad_error_bt, "grad_weight_skd": shares_skd}
    return [
        Launch(
            triton_kernels.scores_backward_kernel,
            grid=(segments, -(-channels // config.tiles["BLOCK_D"])),
            args=args,
            constants={"TAPS": taps, "SEGMENT": segment, **config.tiles},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            bytes=num_bytes(*(x for x in args.values() if isinstance(x, Tensor))),
        )
    ]


class Ranked(NamedTuple):
    """SelectInputs with ranks, for torch.library: tensors first."""

    rank_bs: Tensor
    position_bs: Tensor
    doc_ids_bs: Tensor | None
    num_queries: int
    chunk_size: int
    window_size: int
    num_eidetic: int
    start: int
    num_slots: int


def plan_select(inputs: Ranked, index_bjm: Tensor) -> list[Launch]:
    """Sort what leaves the window at each boundary, in parallel; then merge along the chunks. Queries from within a
    chunk have the slots alone."""
    rank_bs, position_bs, doc_ids_bs, num_queries, chunk_size, window_size, _, start, num_slots = inputs
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


def _args(inputs: ScoreInputs) -> dict[str, Tensor | int | None]:
    y_btd, weight_kd, past_bkd, doc_ids_bt = inputs
    _, t, channels = y_btd.shape
    return {
        "y_btd": y_btd,
        "weight_kd": weight_kd,
        "past_bkd": past_bkd,
        "doc_ids_bt": doc_ids_bt,
        "num_rows": t,
        "num_channels": channels,
        "y_stride_b": y_btd.stride(0),
        "y_stride_t": y_btd.stride(1),
        "weight_stride_k": weight_kd.stride(0),
        "weight_stride_d": weight_kd.stride(1) if weight_kd.shape[1] > 1 else 0,
    }


def _lanes(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _list_of(lanes: int) -> dict[str, int]:
    return {"LANES": lanes, "LOG_LANES": lanes.bit_length() - 1}


def _num_warps(lanes: int) -> int:
    """Two lanes per thread: a sort is a chain of exchanges, short of parallel work."""
    return min(16, max(1, lanes // 64))
