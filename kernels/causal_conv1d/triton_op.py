"""The causal convolution's Triton path: limits, launches, and its registration with torch.library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d import triton_kernels
from kernels.launch import Launch, num_bytes
from kernels.tuning import ARCHITECTURES, INTERPRETER, Config, architecture, choose, require

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (2, 3, 4)

# A thread holds 4 channels (8 bytes of bf16 a load), or 2 with more warps to hide latency. 4 rows are loaded
# ahead: 8 spill in the backward. A segment reads WIDTH - 1 rows of the next one again, so a long one reads
# less, but leaves fewer programs.
_GPU = (
    Config({"SEGMENT": 128, "ROWS": 4, "BLOCK_D": 512}, num_warps=4),
    Config({"SEGMENT": 64, "ROWS": 4, "BLOCK_D": 512}, num_warps=4),
    Config({"SEGMENT": 128, "ROWS": 4, "BLOCK_D": 256}, num_warps=4),
)
CONFIGS: dict[str, tuple[Config, ...]] = {
    **dict.fromkeys(ARCHITECTURES, _GPU),
    INTERPRETER: (Config({"SEGMENT": 8, "ROWS": 2, "BLOCK_D": 32}),),
}
STEP_CONFIG = Config({"BLOCK_D": 512}, num_warps=4)


def causal_conv1d_triton(
    x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> Tensor:
    """y_btd of kernels.causal_conv1d. Raises ValueError: see check_limits."""
    check_limits(x_btd, weight_dk)
    x_btd = x_btd if x_btd.stride(-1) == 1 else x_btd.contiguous()
    initial_bkd = None if initial_bkd is None else initial_bkd.contiguous()
    doc_ids_bt = None if doc_ids_bt is None else doc_ids_bt.contiguous()
    y_btd: Tensor = torch.ops.bmojo.causal_conv1d(x_btd, weight_dk.contiguous(), initial_bkd, doc_ids_bt)
    return y_btd


def causal_conv1d_step_triton(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor) -> Tensor:
    """y_bd of kernels.causal_conv1d_step. Raises ValueError: see check_limits; state_bkd is not contiguous."""
    check_limits(x_bd, weight_dk)
    require(state_bkd.is_contiguous(), "causal_conv1d_step updates state_bkd in place: it must be contiguous.")
    x_bd = x_bd if x_bd.stride(-1) == 1 else x_bd.contiguous()
    y_bd: Tensor = torch.ops.bmojo.causal_conv1d_step(x_bd, weight_dk.contiguous(), state_bkd)
    return y_bd


def check_limits(x: Tensor, weight_dk: Tensor) -> None:
    """Raise ValueError where the kernels do not serve these dtypes or this width."""
    channels, width = weight_dk.shape
    require(
        x.dtype in DTYPES and weight_dk.dtype in DTYPES,
        f"causal_conv1d in Triton takes bfloat16, float16 and float32, not {x.dtype} with weight {weight_dk.dtype}; "
        "use BMOJO_KERNELS=torch.",
    )
    require(
        width in WIDTHS, f"causal_conv1d in Triton takes 2 to 4 taps, weight_dk has {width}; use BMOJO_KERNELS=torch."
    )
    require(x.shape[-1] == channels, f"x has {x.shape[-1]} channels, but weight_dk has {channels}.")


@torch.library.custom_op("bmojo::causal_conv1d", mutates_args=())
def causal_conv1d_op(x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None) -> Tensor:
    y_btd = torch.empty(x_btd.shape, dtype=x_btd.dtype, device=x_btd.device)
    arch = architecture(x_btd.device)

    def plan(config: Config) -> list[Launch]:
        return plan_forward(x_btd, weight_dk, initial_bkd, doc_ids_bt, y_btd, config)

    for launch in plan(choose("causal_conv1d_forward", arch, CONFIGS[arch], _key(x_btd, weight_dk), plan)):
        launch.run()
    return y_btd


@torch.library.custom_op("bmojo::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None, grad_y_btd: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x_btd = torch.empty(x_btd.shape, dtype=x_btd.dtype, device=x_btd.device)
    arch = architecture(x_btd.device)

    def plan(config: Config) -> list[Launch]:
        shares_skd = weight_shares(x_btd, weight_dk, config)
        return plan_backward(x_btd, weight_dk, initial_bkd, doc_ids_bt, grad_y_btd, grad_x_btd, shares_skd, config)

    (launch,) = plan(choose("causal_conv1d_backward", arch, CONFIGS[arch], _key(x_btd, weight_dk), plan))
    launch.run()
    grad_weight_kd = launch.args["grad_weight_skd"].sum(0)
    return grad_x_btd, grad_weight_kd.t().contiguous().to(weight_dk.dtype)


@torch.library.custom_op("bmojo::causal_conv1d_step", mutates_args=("state_bkd",))
def causal_conv1d_step_op(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor) -> Tensor:
    y_bd = _step_output(x_bd, weight_dk)
    for launch in plan_step(x_bd, weight_dk, state_bkd, y_bd, STEP_CONFIG):
        launch.run()
    return y_bd


@causal_conv1d_op.register_fake
def _(x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None) -> Tensor:
    return torch.empty(x_btd.shape, dtype=x_btd.dtype, device=x_btd.device)


@causal_conv1d_backward_op.register_fake
def _(
    x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None, grad_y_btd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty(x_btd.shape, dtype=x_btd.dtype, device=x_btd.device), torch.empty_like(weight_dk)


@causal_conv1d_step_op.register_fake
def _step_output(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor | None = None) -> Tensor:
    return torch.empty(x_bd.shape, dtype=torch.promote_types(x_bd.dtype, weight_dk.dtype), device=x_bd.device)


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y_btd: Tensor) -> tuple[Tensor | None, ...]:
    grad_x_btd, grad_weight_dk = torch.ops.bmojo.causal_conv1d_backward(*ctx.saved_tensors, grad_y_btd.contiguous())
    return grad_x_btd, grad_weight_dk, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_save_inputs)


def plan_forward(
    x_btd: Tensor,
    weight_dk: Tensor,
    initial_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    y_btd: Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that writes y_btd."""
    args = _inputs(x_btd, weight_dk, initial_bkd, doc_ids_bt)
    moved = num_bytes(x_btd, weight_dk, initial_bkd, doc_ids_bt, y_btd)
    return [_launch(triton_kernels.conv_forward_kernel, {**args, "y_btd": y_btd}, moved, config)]


def plan_backward(
    x_btd: Tensor,
    weight_dk: Tensor,
    initial_bkd: Tensor | None,
    doc_ids_bt: Tensor | None,
    grad_y_btd: Tensor,
    grad_x_btd: Tensor,
    grad_weight_skd: Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that writes grad_x_btd and every segment's share of the weight's gradient."""
    args = _inputs(x_btd, weight_dk, initial_bkd, doc_ids_bt)
    args |= {"grad_y_btd": grad_y_btd, "grad_x_btd": grad_x_btd, "grad_weight_skd": grad_weight_skd}
    moved = num_bytes(*(value for value in args.values() if isinstance(value, Tensor)))
    return [_launch(triton_kernels.conv_backward_kernel, args, moved, config)]


def plan_step(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor, y_bd: Tensor, config: Config) -> list[Launch]:
    """The launch that writes y_bd and moves the state."""
    batch, channels = x_bd.shape
    tensors = {"x_bd": x_bd, "weight_dk": weight_dk, "state_bkd": state_bkd, "y_bd": y_bd}
    return [
        Launch(
            triton_kernels.conv_step_kernel,
            grid=(batch, -(-channels // config.tiles["BLOCK_D"])),
            args={**tensors, "num_channels": channels, "x_stride_b": x_bd.stride(0)},
            constants={"WIDTH": weight_dk.shape[1], **config.tiles},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            bytes=num_bytes(x_bd, weight_dk, state_bkd, state_bkd, y_bd),
        )
    ]


def weight_shares(x_btd: Tensor, weight_dk: Tensor, config: Config) -> Tensor:
    """Room for the gradient of the weight that each segment of rows adds."""
    batch, t, channels = x_btd.shape
    segments = batch * -(-t // config.tiles["SEGMENT"])
    return torch.empty(segments, weight_dk.shape[1], channels, dtype=torch.float32, device=x_btd.device)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: bf16, batch 8, 4096 tokens, 4096 channels, width 4."""
    config = CONFIGS[arch][0]
    x_btd = torch.empty(8, 4096, 4096, dtype=torch.bfloat16, device="meta")
    weight_dk = torch.empty(4096, 4, dtype=torch.bfloat16, device="meta")
    state_bkd = torch.empty(8, 3, 4096, dtype=torch.bfloat16, device="meta")
    docs_bt = torch.empty(8, 4096, dtype=torch.int64, device="meta")
    shares_skd = weight_shares(x_btd, weight_dk, config)
    cases = []
    for name, docs in (("", None), (", documents", docs_bt)):
        cases += [
            (f"forward{name}", plan_forward(x_btd, weight_dk, None, docs, x_btd, config)),
            (f"backward{name}", plan_backward(x_btd, weight_dk, None, docs, x_btd, x_btd, shares_skd, config)),
        ]
    cases.append(("step", plan_step(x_btd[:, 0], weight_dk, state_bkd, x_btd[:, 0], STEP_CONFIG)))
    return cases


def _inputs(
    x_btd: Tensor, weight_dk: Tensor, initial_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> dict[str, Tensor | int | None]:
    _, t, channels = x_btd.shape
    return {
        "x_btd": x_btd,
        "weight_dk": weight_dk,
        "initial_bkd": initial_bkd,
        "doc_ids_bt": doc_ids_bt,
        "num_rows": t,
        "num_channels": channels,
        "x_stride_b": x_btd.stride(0),
        "x_stride_t": x_btd.stride(1),
    }


def _launch(kernel: Any, args: dict[str, Any], moved: int, config: Config) -> Launch:
    batch, t, channels = args["x_btd"].shape
    return Launch(
        kernel,
        grid=(batch * -(-t // config.tiles["SEGMENT"]), -(-channels // config.tiles["BLOCK_D"])),
        args=args,
        constants={"WIDTH": args["weight_dk"].shape[1], **config.tiles},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        bytes=moved,
    )


def _key(x_btd: Tensor, weight_dk: Tensor) -> tuple[object, ...]:
    return (*x_btd.shape, weight_dk.shape[1], x_btd.dtype)
