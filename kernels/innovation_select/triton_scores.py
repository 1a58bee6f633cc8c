"""The innovation scores' Triton path: limits, launches, and its registration with torch.library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.innovation_select import triton_kernels
from kernels.innovation_select.scores import EPS
from kernels.launch import Launch, num_bytes
from kernels.tuning import ARCHITECTURES, INTERPRETER, Config, architecture, choose, require

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TAPS = 16  # the loop over taps is unrolled

# A thread holds 8 channels of one row, 16 bytes a load of bf16: with the rows its taps meet that is about 60 registers
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
BLOCKS_A_SEGMENT = 8  # of the backward, which writes one share of the weight's gradient a segment


def innovation_scores_triton(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> Tensor:
    """See kernels.innovation_select.innovation_scores. Raises ValueError: more than MAX_TAPS taps; other dtypes."""
    require(
        y_btd.dtype in DTYPES,
        f"innovation_scores in Triton takes bfloat16, float16 and float32, not {y_btd.dtype}; use BMOJO_KERNELS=torch.",
    )
    require(
        weight_kd.shape[0] <= MAX_TAPS,
        f"innovation_scores in Triton takes at most {MAX_TAPS} taps, not {weight_kd.shape[0]}; "
        "use BMOJO_KERNELS=torch.",
    )
    y_btd = y_btd.detach()
    y_btd = y_btd if y_btd.stride(-1) == 1 else y_btd.contiguous()
    past_bkd = None if past_bkd is None else past_bkd.detach().contiguous()
    doc_ids_bt = None if doc_ids_bt is None else doc_ids_bt.contiguous()
    error_bt: Tensor = torch.ops.bmojo.innovation_scores(y_btd, weight_kd, past_bkd, doc_ids_bt)[0]
    return error_bt


@torch.library.custom_op("bmojo::innovation_scores", mutates_args=())
def innovation_scores_op(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """error_bt, and the energy_bt it was divided by, for the backward."""
    error_bt, energy_bt = _scores(y_btd, weight_kd, past_bkd, doc_ids_bt)
    arch = architecture(y_btd.device)

    def plan(config: Config) -> list[Launch]:
        return plan_scores(y_btd, weight_kd, past_bkd, doc_ids_bt, error_bt, energy_bt, config)

    for launch in plan(choose("innovation_scores", arch, CONFIGS[arch], _key(y_btd, weight_kd), plan)):
        launch.run()
    return error_bt, energy_bt


@innovation_scores_op.register_fake
def _scores(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> tuple[Tensor, Tensor]:
    error_bt = torch.empty(y_btd.shape[:2], dtype=torch.float32, device=y_btd.device)
    return error_bt, torch.empty_like(error_bt)


@torch.library.custom_op("bmojo::innovation_scores_backward", mutates_args=())
def innovation_scores_backward_op(
    y_btd: Tensor,
    weight_kd: Tensor,
    past_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    energy_bt: Tensor,
    grad_error_bt: Tensor,
) -> Tensor:
    arch = architecture(y_btd.device)

    def plan(config: Config) -> list[Launch]:
        return plan_backward(y_btd, weight_kd, past_bkd, doc_ids_bt, energy_bt, grad_error_bt, config)

    (launch,) = plan(choose("innovation_scores_backward", arch, CONFIGS[arch], _key(y_btd, weight_kd), plan))
    launch.run()
    grad_weight_kd: Tensor = launch.args["grad_weight_skd"].sum(0).sum_to_size(weight_kd.shape)
    return grad_weight_kd.to(weight_kd.dtype)


@innovation_scores_backward_op.register_fake
def _(
    y_btd: Tensor,
    weight_kd: Tensor,
    past_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    energy_bt: Tensor,
    grad_error_bt: Tensor,
) -> Tensor:
    return torch.empty(weight_kd.shape, dtype=weight_kd.dtype, device=weight_kd.device)


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_error_bt: Tensor, grad_energy_bt: Tensor) -> tuple[Tensor | None, ...]:
    """To the weights alone: y enters detached, and the energy is no result."""
    grad = torch.ops.bmojo.innovation_scores_backward(*ctx.saved_tensors, grad_error_bt.contiguous())
    return None, grad, None, None


innovation_scores_op.register_autograd(_backward, setup_context=_save_inputs)


def plan_scores(
    y_btd: Tensor,
    weight_kd: Tensor,
    past_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    error_bt: Tensor,
    energy_bt: Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that reads y once and writes every position's score."""
    batch, t, _ = y_btd.shape
    args = _inputs(y_btd, weight_kd, past_bkd, doc_ids_bt) | {"error_bt": error_bt, "energy_bt": energy_bt}
    return [
        Launch(
            triton_kernels.scores_kernel,
            grid=(batch * -(-t // config.tiles["BLOCK_T"]),),
            args={**args, "eps": EPS},
            constants={"TAPS": weight_kd.shape[0], **config.tiles},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            bytes=num_bytes(*(x for x in args.values() if isinstance(x, Tensor))),
        )
    ]


def plan_backward(
    y_btd: Tensor,
    weight_kd: Tensor,
    past_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    energy_bt: Tensor,
    grad_error_bt: Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that writes every segment's share of the weight's gradient, args["grad_weight_skd"]."""
    batch, t, channels = y_btd.shape
    taps, segment = weight_kd.shape[0], BLOCKS_A_SEGMENT * config.tiles["BLOCK_T"]
    segments = batch * -(-t // segment)
    shares_skd = torch.empty(segments, taps, channels, dtype=torch.float32, device=y_btd.device)
    args = _inputs(y_btd, weight_kd, past_bkd, doc_ids_bt)
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


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: bf16, batch 8, 4096 tokens, d 2048, 4 taps a channel."""
    config = CONFIGS[arch][0]
    y_btd = torch.empty(8, 4096, 2048, dtype=torch.bfloat16, device="meta")
    weight_kd = torch.empty(4, 2048, dtype=torch.bfloat16, device="meta")
    error_bt = torch.empty(8, 4096, device="meta")
    return [
        ("scores", plan_scores(y_btd, weight_kd, None, None, error_bt, error_bt, config)),
        ("scores, backward", plan_backward(y_btd, weight_kd, None, None, error_bt, error_bt, config)),
    ]


def _inputs(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> dict[str, Tensor | int | None]:
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


def _key(y_btd: Tensor, weight_kd: Tensor) -> tuple[object, ...]:
    return (*y_btd.shape, weight_kd.shape[0], y_btd.dtype)
