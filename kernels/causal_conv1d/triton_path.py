"""The causal convolution in Triton: limits, and the launches of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.again import keeps_small_results, made_by
from kernels.causal_conv1d import triton_kernels
from kernels.causal_conv1d.reference import ConvInputs, ConvOutputs, StepInputs, tail
from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import ARCHITECTURES, INTERPRETER, Config, architecture, choose
from kernels.operator import Path, library_op

# bfloat16: the interpreter cuts float32 to it (up to 2^-7), where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)
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


def _refuses(inputs: ConvInputs) -> str | None:
    return _limit(inputs.x_btd, inputs.weight_dk)


def _step_refuses(inputs: StepInputs) -> str | None:
    if not inputs.state_bkd.is_contiguous():
        return "causal_conv1d_step updates state_bkd in place: it must be contiguous."
    return _limit(inputs.x_bd, inputs.weight_dk)


def _limit(x: Tensor, weight_dk: Tensor) -> str | None:
    """The limit that these dtypes, this width or these channels exceed."""
    channels, width = weight_dk.shape
    if x.dtype not in DTYPES or weight_dk.dtype not in DTYPES:
        return (
            f"causal_conv1d in Triton takes bfloat16, float16 and float32, not {x.dtype} with weight "
            f"{weight_dk.dtype}; use BMOJO_KERNELS=torch."
        )
    if width not in WIDTHS:
        return f"causal_conv1d in Triton takes 2 to 4 taps, weight_dk has {width}; use BMOJO_KERNELS=torch."
    return None if x.shape[-1] == channels else f"x has {x.shape[-1]} channels, but weight_dk has {channels}."


def _empty_output(inputs: ConvInputs) -> Tensor:
    return torch.empty(inputs.x_btd.shape, dtype=inputs.x_btd.dtype, device=inputs.x_btd.device)


def _forward(inputs: ConvInputs) -> Tensor:
    y_btd = _empty_output(inputs)
    arch = architecture(y_btd.device)

    def plan(config: Config) -> list[Launch]:
        return plan_forward(inputs, y_btd, config)

    for launch in plan(choose("causal_conv1d_forward", arch, CONFIGS[arch], _key(inputs), plan)):
        launch.run()
    return y_btd


def _backward(inputs: ConvInputs, grad_y_btd: Tensor) -> tuple[Tensor, Tensor]:
    grad_y_btd, grad_x_btd = grad_y_btd.contiguous(), _empty_output(inputs)
    arch = architecture(grad_x_btd.device)

    def plan(config: Config) -> list[Launch]:
        return plan_backward(inputs, grad_y_btd, grad_x_btd, weight_shares(inputs, config), config)

    (launch,) = plan(choose("causal_conv1d_backward", arch, CONFIGS[arch], _key(inputs), plan))
    launch.run()
    grad_weight_kd = launch.args["grad_weight_skd"].sum(0)
    return grad_x_btd, grad_weight_kd.t().contiguous().to(inputs.weight_dk.dtype)


def _empty_step_output(inputs: StepInputs) -> Tensor:
    x_bd, weight_dk, _ = inputs
    return torch.empty(x_bd.shape, dtype=torch.promote_types(x_bd.dtype, weight_dk.dtype), device=x_bd.device)


def _step(inputs: StepInputs) -> Tensor:
    y_bd = _empty_step_output(inputs)
    for launch in plan_step(inputs, y_bd, STEP_CONFIG):
        launch.run()
    return y_bd


convolve = library_op(
    "causal_conv1d", ConvInputs, _forward, _empty_output, gradients=("x_btd", "weight_dk"), backward=_backward
)
step = library_op("causal_conv1d_step", StepInputs, _step, _empty_step_output, mutates=("state_bkd",))


def _run(inputs: ConvInputs) -> ConvOutputs:
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    laid_out = ConvInputs(
        _channels_contiguous(x_btd),
        weight_dk.contiguous(),
        None if initial_btd is None else initial_btd.contiguous(),
        None if doc_ids_bt is None else doc_ids_bt.contiguous(),
    )
    y_btd = convolve(*laid_out)
    if not keeps_small_results():
        made_by(_made_again, laid_out, y_btd)
    return ConvOutputs(y_btd, tail(inputs))


def _made_again(*inputs: Any) -> tuple[Tensor]:
    return (_forward(ConvInputs(*inputs)),)


def _run_step(inputs: StepInputs) -> Tensor:
    y_bd: Tensor = step(_channels_contiguous(inputs.x_bd), inputs.weight_dk.contiguous(), inputs.state_bkd)
    return y_bd


causal_conv1d = Path(_run, _refuses, TOLERANCE, strict=True)
causal_conv1d_step = Path(_run_step, _step_refuses, TOLERANCE, strict=True)


def plan_forward(inputs: ConvInputs, y_btd: Tensor, config: Config) -> list[Launch]:
    """The launch that writes y_btd."""
    return [_launch(triton_kernels.conv_forward_kernel, inputs, {"y_btd": y_btd}, config)]


def plan_backward(
    inputs: ConvInputs, grad_y_btd: Tensor, grad_x_btd: Tensor, grad_weight_skd: Tensor, config: Config
) -> list[Launch]:
    """The launch that writes grad_x_btd and every segment's share of the weight's gradient."""
    grads = {"grad_y_btd": grad_y_btd, "grad_x_btd": grad_x_btd, "grad_weight_skd": grad_weight_skd}
    return [_launch(triton_kernels.conv_backward_kernel, inputs, grads, config)]


def plan_step(inputs: StepInputs, y_bd: Tensor, config: Config) -> list[Launch]:
    """The launch that writes y_bd and moves the state."""
    x_bd, weight_dk, state_bkd = inputs
    batch, channels = x_bd.shape
    return [
        Launch(
            triton_kernels.conv_step_kernel,
            grid=(batch, -(-channels // config.tiles["BLOCK_D"])),
            args={**inputs._asdict(), "y_bd": y_bd, "num_channels": channels, "x_stride_b": x_bd.stride(0)},
            constants={"WIDTH": weight_dk.shape[1], **config.tiles},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            bytes=num_bytes(x_bd, weight_dk, state_bkd, state_bkd, y_bd),
        )
    ]


def weight_shares(inputs: ConvInputs, config: Config) -> Tensor:
    """Room for the gradient of the weight that each segment of rows adds."""
    batch, t, channels = inputs.x_btd.shape
    segments = batch * -(-t // config.tiles["SEGMENT"])
    shape = segments, inputs.weight_dk.shape[1], channels
    return torch.empty(shape, dtype=torch.float32, device=inputs.x_btd.device)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches at a representative size, on meta tensors: bf16, batch 8, 4096 tokens, 4096 channels, width 4."""
    config = CONFIGS[arch][0]
    x_btd = torch.empty(8, 4096, 4096, dtype=torch.bfloat16, device="meta")
    weight_dk, state_bkd = x_btd.new_empty(4096, 4), x_btd.new_empty(8, 3, 4096)
    docs_bt = torch.empty(8, 4096, dtype=torch.int64, device="meta")
    cases = []
    for name, docs in (("", None), (", documents", docs_bt)):
        inputs = ConvInputs(x_btd, weight_dk, None, docs)
        cases += [
            (f"forward{name}", plan_forward(inputs, x_btd, config)),
            (f"backward{name}", plan_backward(inputs, x_btd, x_btd, weight_shares(inputs, config), config)),
        ]
    cases.append(("step", plan_step(StepInputs(x_btd[:, 0], weight_dk, state_bkd), x_btd[:, 0], STEP_CONFIG)))
    return cases


def _launch(kernel: Any, inputs: ConvInputs, others: dict[str, Tensor], config: Config) -> Launch:
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    batch, t, channels = x_btd.shape
    tensors = {"x_btd": x_btd, "weight_dk": weight_dk, "initial_bkd": initial_btd, "doc_ids_bt": doc_ids_bt, **others}
    sizes = {"num_rows": t, "num_channels": channels, "x_stride_b": x_btd.stride(0), "x_stride_t": x_btd.stride(1)}
    return Launch(
        kernel,
        grid=(batch * -(-t // config.tiles["SEGMENT"]), -(-channels // config.tiles["BLOCK_D"])),
        args={**tensors, **sizes},
        constants={"WIDTH": weight_dk.shape[1], **config.tiles},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        bytes=num_bytes(*tensors.values()),
    )


def _channels_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _key(inputs: ConvInputs) -> tuple[object, ...]:
    return (*inputs.x_btd.shape, inputs.weight_dk.shape[1], inputs.x_btd.dtype)
