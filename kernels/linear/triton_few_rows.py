"""Products with few rows in Triton, for decoding: cuBLAS takes twice as long, as its tiles leave most of a GPU idle."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import ARCHITECTURES, INTERPRETER, Config, architecture, choose
from kernels.linear.reference import LinearInputs
from kernels.linear.triton_kernels import few_rows_kernel
from kernels.operator import Path

# bfloat16: the interpreter cuts float32 to it (up to 2^-7), where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MAX_ROWS = 8  # each costs as many multiply-adds as the weight has elements, without tensor cores
MAX_BLOCK_I = 1024  # of a row of the weight that a program holds, per loop

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


def _refuses(inputs: LinearInputs) -> str | None:
    x, weight_oi = inputs
    if torch.is_grad_enabled() and (x.requires_grad or weight_oi.requires_grad):
        return "a gradient is wanted"
    if x.numel() > MAX_ROWS * x.shape[-1] or x.numel() == 0:
        return f"more than {MAX_ROWS} rows, or none"
    if torch.compiler.is_compiling() or (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return "torch.compile and autocast are for cuBLAS"
    if x.dtype != weight_oi.dtype or x.dtype not in TOLERANCE or x.shape[-1] != weight_oi.shape[1]:
        return f"products of {x.dtype} {tuple(x.shape)} and {weight_oi.dtype} {tuple(weight_oi.shape)}"
    return None if weight_oi.stride(1) == 1 else "a weight whose rows are not contiguous"


def plan(x_ri: Tensor, weight_oi: Tensor, y_ro: Tensor, config: Config) -> Launch:
    """Write y_ro."""
    num_out, num_in = weight_oi.shape
    block_i = min(MAX_BLOCK_I, max(16, 1 << (num_in - 1).bit_length()))
    sizes = {"num_in": num_in, "num_out": num_out}
    strides = {"x_stride_r": x_ri.stride(0), "weight_stride_o": weight_oi.stride(0)}
    return Launch(
        few_rows_kernel,
        (-(-num_out // config.tiles["BLOCK_O"]),),
        {"x_ri": x_ri, "weight_oi": weight_oi, "y_ro": y_ro, **sizes, **strides},
        {"ROWS": x_ri.shape[0], "BLOCK_I": block_i, "NUM_BLOCKS": -(-num_in // block_i), **config.tiles},
        num_warps=config.num_warps,
        bytes=num_bytes(x_ri, weight_oi, y_ro),
    )


def _run(inputs: LinearInputs) -> Tensor:
    x, weight_oi = inputs
    x_ri = x.reshape(-1, x.shape[-1])
    x_ri = x_ri if x_ri.stride(1) == 1 else x_ri.contiguous()
    y_ro = torch.empty(x_ri.shape[0], weight_oi.shape[0], dtype=x.dtype, device=x.device)
    arch = architecture(x.device)
    key = (*x_ri.shape, weight_oi.shape[0], x.dtype)
    config = choose("linear_few_rows", arch, CONFIGS[arch], key, lambda config: [plan(x_ri, weight_oi, y_ro, config)])
    plan(x_ri, weight_oi, y_ro, config).run()
    return y_ro.view(*x.shape[:-1], -1)


linear = Path(_run, _refuses, TOLERANCE)


def few_rows_case(arch: str) -> tuple[str, list[Launch]]:
    """The launch that `make kernel-report` compiles: bf16, one row, 768 to 2,816 channels."""
    x, weight = (torch.empty(rows, 768, dtype=torch.bfloat16, device="meta") for rows in (1, 2816))
    return "one row", [plan(x, weight, x.new_empty(1, 2816), CONFIGS[arch][0])]
