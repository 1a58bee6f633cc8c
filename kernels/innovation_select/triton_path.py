"""Innovation scores and selection in Triton: limits, and the launches of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Config, architecture, choose
from kernels.innovation_select.reference import ScoreInputs, SelectInputs, ranks
from kernels.innovation_select.triton_plan import (
    CONFIGS,
    Ranked,
    plan_scores,
    plan_scores_backward,
    plan_select,
)
from kernels.innovation_select.triton_step import step_case
from kernels.operator import Path, library_op

TOLERANCE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 2e-6)  # y is exact in float32
MAX_TAPS = 16  # the loop over taps is unrolled
RANK_DTYPES = (torch.float32, torch.float64)
MAX_SORTED = 4096  # lanes one program sorts: exchanging their ranks takes 32 KiB of shared memory


def _refuses_scores(inputs: ScoreInputs) -> str | None:
    dtype, taps = inputs.y_btd.dtype, inputs.weight_kd.shape[0]
    if dtype not in TOLERANCE:
        return f"innovation_scores in Triton takes bfloat16, float16 and float32, not {dtype}; use BMOJO_KERNELS=torch."
    if taps > MAX_TAPS:
        return f"innovation_scores in Triton takes at most {MAX_TAPS} taps, not {taps}; use BMOJO_KERNELS=torch."
    return None


def _refuses_select(inputs: SelectInputs) -> str | None:
    sizes = {"num_eidetic": inputs.num_eidetic}
    if inputs.start % inputs.chunk_size == 0:
        sizes["chunk_size"] = inputs.chunk_size
    return _limit(inputs.log_innovation_bs, inputs.tau, sizes)


def _limit(log_innovation: Tensor, tau: float | None, sizes: dict[str, int]) -> str | None:
    """The limit that the ranks' dtype or one of the sizes exceeds."""
    if tau is None and log_innovation.dtype not in RANK_DTYPES:
        return f"innovation_select in Triton takes scores in float32 and float64, not {log_innovation.dtype}."
    for name, size in sizes.items():
        if size > MAX_SORTED:
            return (
                f"innovation_select in Triton sorts at most {MAX_SORTED} rows at a time, but {name} is {size}; "
                "use BMOJO_KERNELS=torch."
            )
    return None


def _scores(inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    """error_bt, and the energy_bt it was divided by, for the backward."""
    error_bt, energy_bt = _empty_scores(inputs)
    arch = architecture(error_bt.device)

    def plan(config: Config) -> list[Launch]:
        return plan_scores(inputs, error_bt, energy_bt, config)

    for launch in plan(choose("innovation_scores", arch, CONFIGS[arch], _key(inputs), plan)):
        launch.run()
    return error_bt, energy_bt


def _empty_scores(inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    error_bt = torch.empty(inputs.y_btd.shape[:2], dtype=torch.float32, device=inputs.y_btd.device)
    return error_bt, torch.empty_like(error_bt)


def _scores_backward(inputs: ScoreInputs, _: Tensor, energy_bt: Tensor, grad_error_bt: Tensor) -> tuple[Tensor]:
    """To the weights alone: y enters detached, and the energy is no result."""
    grad_error_bt = grad_error_bt.contiguous()
    arch = architecture(energy_bt.device)

    def plan(config: Config) -> list[Launch]:
        return plan_scores_backward(inputs, energy_bt, grad_error_bt, config)

    (launch,) = plan(choose("innovation_scores_backward", arch, CONFIGS[arch], _key(inputs), plan))
    launch.run()
    grad_weight_kd: Tensor = launch.args["grad_weight_skd"].sum(0).sum_to_size(inputs.weight_kd.shape)
    return (grad_weight_kd.to(inputs.weight_kd.dtype),)


def _select(inputs: Ranked) -> Tensor:
    index_bjm = _empty_index(inputs)
    if index_bjm.numel():
        for launch in plan_select(inputs, index_bjm):
            launch.run()
    return index_bjm


def _empty_index(inputs: Ranked) -> Tensor:
    chunks = -(-inputs.num_queries // inputs.chunk_size)
    shape = (inputs.rank_bs.shape[0], chunks, inputs.num_eidetic)
    return torch.empty(shape, dtype=torch.int64, device=inputs.rank_bs.device)


score = library_op(
    "innovation_scores",
    ScoreInputs,
    _scores,
    _empty_scores,
    num_outputs=2,
    gradients=("weight_kd",),
    backward=_scores_backward,
    num_differentiable=1,
    keeps_outputs=True,
)
select = library_op("innovation_select", Ranked, _select, _empty_index)


def _run_scores(inputs: ScoreInputs) -> Tensor:
    y_btd, weight_kd, past_bkd, doc_ids_bt = inputs
    y_btd = y_btd.detach()
    y_btd = y_btd if y_btd.stride(-1) == 1 else y_btd.contiguous()
    past_bkd = None if past_bkd is None else past_bkd.detach().contiguous()
    error_bt: Tensor = score(y_btd, weight_kd, past_bkd, None if doc_ids_bt is None else doc_ids_bt.contiguous())[0]
    return error_bt


def _run_select(inputs: SelectInputs) -> Tensor:
    log_e_bs, position_bs, num_queries, chunk_size, window_size, num_eidetic, tau, doc_ids_bs, start, num_slots = inputs
    rank_bs = ranks(log_e_bs, position_bs, tau).contiguous()
    docs_bs = None if doc_ids_bs is None else doc_ids_bs.contiguous()
    sizes = (num_queries, chunk_size, window_size, num_eidetic, start, num_slots)
    index_bjm: Tensor = select(rank_bs, position_bs.contiguous(), docs_bs, *sizes)
    return index_bjm


innovation_scores = Path(_run_scores, _refuses_scores, TOLERANCE, strict=True)
innovation_select = Path(_run_select, _refuses_select, strict=True)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: batch 8, 4096 tokens, d 2048, 4 taps, C 256, W 512, M 128."""
    config = CONFIGS[arch][0]
    y_btd = torch.empty(8, 4096, 2048, dtype=torch.bfloat16, device="meta")
    scores = ScoreInputs(y_btd, y_btd.new_empty(4, 2048))
    rank_bs = torch.empty(8, 4096, device="meta")
    position_bs = torch.empty(8, 4096, dtype=torch.int64, device="meta")
    plain = Ranked(rank_bs, position_bs, None, 4096, 256, 512, 128, 0, 0)
    forgetting = plain._replace(rank_bs=rank_bs.double(), doc_ids_bs=position_bs)
    index_bjm = _empty_index(plain)
    return [
        ("scores", plan_scores(scores, rank_bs, rank_bs, config)),
        ("scores, backward", plan_scores_backward(scores, rank_bs, rank_bs, config)),
        ("select", plan_select(plain, index_bjm)),
        ("select, documents, tau", plan_select(forgetting, index_bjm)),
        step_case(),
    ]


def _key(inputs: ScoreInputs) -> tuple[object, ...]:
    return (*inputs.y_btd.shape, inputs.weight_kd.shape[0], inputs.y_btd.dtype)
