"""The launches of memory attention on Hopper: which calls they take, and what differs from triton_plan.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Config
from kernels.memory_attention.hopper_backward import KEY_TEAMS, key_grad_kernel, query_grad_kernel
from kernels.memory_attention.hopper_forward import forward_kernel
from kernels.memory_attention.hopper_tiles import ROWS, TEAMS
from kernels.memory_attention.reference import FlatInputs

HEAD_DIM = 64
QUERY_ROWS, KEY_ROWS = TEAMS.value * ROWS.value, KEY_TEAMS.value * ROWS.value  # of a program
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
NUMBERS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


def _config(stages: int, ahead: int, max_registers: int) -> Config:
    return Config({"STAGES": stages, "AHEAD": ahead}, num_warps=4, max_registers=max_registers)


# Two blocks per processor for the first two kernels, one for the third: 16 or 12 warps.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "forward": (_config(4, 2, 128), _config(5, 3, 128)),
    "query_grad": (_config(3, 1, 128),),
    "key_grad": (_config(4, 2, 168), _config(6, 4, 168)),
}


def candidates(kernel: str, inputs: FlatInputs, arch: str) -> tuple[Config, ...]:
    """CONFIGS for the calls that these kernels take, which waste little there."""
    taken = (
        arch == "sm_90"
        and inputs.q.dtype in (torch.bfloat16, torch.float16)
        and inputs.q.shape[3] == HEAD_DIM
        and (inputs.chunk_size * inputs.group) % QUERY_ROWS == 0
    )
    return CONFIGS.get(kernel, ()) if taken else ()


def is_hopper(config: Config) -> bool:
    """Whether a configuration is one of CONFIGS."""
    return "STAGES" in config.tiles


def forward(inputs: FlatInputs, args: dict[str, Any], config: Config, flops: int, bytes: int) -> Launch:
    return _of_sets(forward_kernel, inputs, args, config, flops, bytes)


def query_grad(inputs: FlatInputs, args: dict[str, Any], config: Config, flops: int, bytes: int) -> Launch:
    return _of_sets(query_grad_kernel, inputs, args, config, flops, bytes)


def key_grad(
    inputs: FlatInputs, args: dict[str, Any], per_query: dict[str, Tensor], grads: tuple[Tensor, Tensor],
    config: Config, flops: int, bytes: int,
) -> Launch:  # fmt: skip
    """per_query: q, grad_out, lse and delta, by name.  grads: of the keys and the values."""
    batch, rows, kv_heads, head_dim = grads[0].shape
    assert grads[0].stride() == grads[1].stride()
    descriptors = {
        "q_tiles": _tiles(per_query["q"]), "grad_out_tiles": _tiles(per_query["grad_out"]),
        "lse_tiles": _numbers(per_query["lse"]), "delta_tiles": _numbers(per_query["delta"]),
    }  # fmt: skip
    written = {"grad_k_ptr": grads[0], "grad_v_ptr": grads[1], "grad_strides": grads[0].stride()[:3]}
    return _launch(
        key_grad_kernel,
        (-(-rows // KEY_ROWS), kv_heads, batch),
        args | descriptors | written,
        {"GROUP": inputs.group, "P": head_dim},
        config,
        flops,
        bytes,
    )


def _of_sets(kernel: Any, inputs: FlatInputs, args: dict[str, Any], config: Config, flops: int, bytes: int) -> Launch:
    """Of a kernel that goes over the three sets."""
    positions = TEAMS.value * (ROWS.value // inputs.group)
    full_chunks = -(-inputs.num_queries // inputs.chunk_size) - 1
    last = inputs.num_queries - full_chunks * inputs.chunk_size
    descriptors = {
        "k_tiles": _tiles(inputs.k), "v_tiles": _tiles(inputs.v),
        "fading_k_tiles": _tiles(inputs.fading_k), "fading_v_tiles": _tiles(inputs.fading_v),
    }  # fmt: skip
    return _launch(
        kernel,
        (full_chunks * -(-inputs.chunk_size // positions) - (-last // positions), inputs.k.shape[2], inputs.q.shape[0]),
        args | descriptors,
        {"NUM_SLOTS": inputs.num_slots, "GROUP": inputs.group, "P": inputs.q.shape[3]},
        config,
        flops,
        bytes,
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constants: dict[str, int], config: Config, flops: int,
    bytes: int,
) -> Launch:  # fmt: skip
    return Launch(
        kernel,
        grid,
        args,
        {**constants, **config.tiles, "REGISTERS": config.max_registers},
        config.num_warps,
        config.num_stages,
        config.max_registers,
        flops=flops,
        bytes=bytes,
    )


def _tiles(x: Tensor | None) -> TensorDescriptor | None:
    """Tiles of 64 rows of one head of a tensor [b, t, h, p]."""
    return None if x is None else _descriptor(x, [1, ROWS.value, 1, x.shape[3]], TILE)


def _numbers(x: Tensor) -> TensorDescriptor:
    """Tiles of 64 numbers of one head of a tensor [b, h, t]."""
    return _descriptor(x, [1, 1, ROWS.value], NUMBERS)


def _descriptor(x: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    # The stride of a dimension of size 1 means nothing, but it must be one that the copy engine takes.
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
