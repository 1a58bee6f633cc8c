"""Products with few rows in Triton, for decoding: cuBLAS takes longer, as its tiles leave most of a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import ARCHITECTURES, INTERPRETER, Config, architecture, choose
from kernels.linear.reference import EachInputs, LinearInputs
from kernels.linear.triton_kernels import few_rows_kernel, gated_few_rows_kernel
from kernels.operator import Path

# bfloat16: the interpreter cuts float32 to it (up to 2^-7), where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GATED_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # rounded before the gate, too
MAX_ROWS = 8  # each costs as many multiply-adds as the weight has elements, without tensor cores
MAX_BLOCK_I = 1024  # of a row of the weight that a program holds, per loop
MAX_WEIGHTS = 3

_GPU = (
    Config({"BLOCK_O": 8}, num_warps=4),
    Config({"BLOCK_O": 4}, num_warps=4),
    Config({"BLOCK_O": 16}, num_warps=4),
    Config({"BLOCK_O": 16}, num_warps=8),
    Config({"BLOCK_O": 4}, num_warps=2),
)
CONFIGS: dict[str, tuple[Config, ...]] = {
    **dict.fromkeys(ARCHITECTURES, _GPU),
    INTERPRETER: (Config({"BLOCK_O": 4}),),
}


def _refuses(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return "a gradient is wanted"
    if x.numel() > MAX_ROWS * x.shape[-1] or x.numel() == 0:
        return f"more than {MAX_ROWS} rows, or none"
    if torch.compiler.is_compiling() or (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return "torch.compile and autocast are for cuBLAS"
    if x.dtype not in TOLERANCE or not 1 <= len(weights) <= MAX_WEIGHTS:
        return f"products of {x.dtype} and {len(weights)} weights"
    for weight_oi in weights:
        if x.dtype != weight_oi.dtype or x.shape[-1] != weight_oi.shape[1]:
            return f"products of {x.dtype} {tuple(x.shape)} and {weight_oi.dtype} {tuple(weight_oi.shape)}"
        if weight_oi.stride(1) != 1:
            return "a weight whose rows are not contiguous"
    return None


def plan(x_ri: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor], config: Config) -> Launch:
    """Write the product with each weight to its output."""
    named: dict[str, Any] = {}
    for name, weight_oi, y_ro in zip(("first", "second", "third"), weights, outputs, strict=False):
        named |= {f"{name}_oi": weight_oi, f"{name}_ro": y_ro}
        named |= {f"num_{name}": weight_oi.shape[0], f"{name}_stride": weight_oi.stride(0)}
    for name in ("second", "third")[len(weights) - 1 :]:
        named |= {f"{name}_oi": None, f"{name}_ro": None, f"num_{name}": 0, f"{name}_stride": 0}
    block_o = config.tiles["BLOCK_O"]
    return Launch(
        few_rows_kernel,
        (sum(-(-weight_oi.shape[0] // block_o) for weight_oi in weights),),
        {"x_ri": x_ri, **named, **_sizes(x_ri)},
        _constants(x_ri, config),
        num_warps=config.num_warps,
        bytes=num_bytes(x_ri, *weights, *outputs),
    )


def plan_gated(x_ri: Tensor, weight_oi: Tensor, y_ro: Tensor, config: Config) -> Launch:
    """Write SiLU(gate) * up; the weight has twice as many rows as y columns."""
    return Launch(
        gated_few_rows_kernel,
        (-(-y_ro.shape[1] // config.tiles["BLOCK_O"]),),
        {"x_ri": x_ri, "weight_oi": weight_oi, "y_ro": y_ro, "num_out": y_ro.shape[1], **_sizes(x_ri)}
        | {"weight_stride": weight_oi.stride(0)},
        _constants(x_ri, config),
        num_warps=config.num_warps,
        bytes=num_bytes(x_ri, weight_oi, y_ro),
    )


def _sizes(x_ri: Tensor) -> dict[str, int]:
    return {"num_in": x_ri.shape[1], "x_stride": x_ri.stride(0)}


def _constants(x_ri: Tensor, config: Config) -> dict[str, int]:
    rows, num_in = x_ri.shape
    block_i = min(MAX_BLOCK_I, max(16, 1 << (num_in - 1).bit_length()))
    return {"ROWS": rows, "BLOCK_I": block_i, "NUM_BLOCKS": -(-num_in // block_i), **config.tiles}


def _each(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    x_ri = _rows(x)
    outputs = [x.new_empty(x_ri.shape[0], weight_oi.shape[0]) for weight_oi in weights]
    _launch("linear_few_rows", x_ri, weights, lambda config: plan(x_ri, weights, outputs, config))
    return tuple(y_ro.view(*x.shape[:-1], -1) for y_ro in outputs)


def _gated(inputs: LinearInputs) -> Tensor:
    x, weight_oi = inputs
    x_ri = _rows(x)
    y_ro = x.new_empty(x_ri.shape[0], weight_oi.shape[0] // 2)
    _launch("gated_linear_few_rows", x_ri, [weight_oi], lambda config: plan_gated(x_ri, weight_oi, y_ro, config))
    return y_ro.view(*x.shape[:-1], -1)


def _launch(operator: str, x_ri: Tensor, weights: Sequence[Tensor], launch: Callable[[Config], Launch]) -> None:
    arch = architecture(x_ri.device)
    key = (*x_ri.shape, *(weight_oi.shape[0] for weight_oi in weights), x_ri.dtype)
    launch(choose(operator, arch, CONFIGS[arch], key, lambda config: [launch(config)])).run()


def _rows(x: Tensor) -> Tensor:
    x_ri = x.reshape(-1, x.shape[-1])
    return x_ri if x_ri.stride(1) == 1 else x_ri.contiguous()


linear = Path[LinearInputs, Tensor](
    lambda inputs: _each(inputs.x, [inputs.weight_oi])[0],
    lambda inputs: _refuses(inputs.x, [inputs.weight_oi]),
    TOLERANCE,
)
linear_each = Path[EachInputs, tuple[Tensor, ...]](
    lambda inputs: _each(*inputs), lambda inputs: _refuses(*inputs), TOLERANCE
)
gated_linear = Path(_gated, lambda inputs: _refuses(inputs.x, [inputs.weight_oi]), GATED_TOLERANCE)


def few_rows_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """The launches that `make kernel-report` compiles: bf16, one row of 768 channels."""
    x, config = torch.empty(1, 768, dtype=torch.bfloat16, device="meta"), CONFIGS[arch][0]
    widths = (1804, 768, 1536)
    weights, outputs = [x.new_empty(width, 768) for width in widths], [x.new_empty(1, width) for width in widths]
    gated = plan_gated(x, x.new_empty(2816, 768), x.new_empty(1, 1408), config)
    return [("one row, three weights", [plan(x, weights, outputs, config)]), ("one row, gated", [gated])]
