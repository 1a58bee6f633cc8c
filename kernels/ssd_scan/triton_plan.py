"""Which launches make up a pass of the SSD scan: tile sizes, grids, arguments, bytes and FLOPs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.launch import Launch
from kernels.ssd_scan import triton_kernels as device
from kernels.tuning import INTERPRETER, Config

# Tiles of a pass. CHUNK: positions a chunk; BLOCK_N: state columns a tile; STATE_P, STATE_N: what one walk carries.
# Warps and stages are those of the kernels that work on all chunks at once.
_SHORT = {"CHUNK": 64, "BLOCK_N": 64, "STATE_P": 64, "STATE_N": 64}
_LONG = {**_SHORT, "CHUNK": 128}
_INTERPRETER = (Config(dict.fromkeys(_SHORT, 16)),)
FORWARD_CONFIGS = {
    "sm_80": (Config(_SHORT, num_warps=4, num_stages=2),),
    "sm_90": (Config(_LONG, num_warps=8, num_stages=2),),
    "sm_100": (Config(_LONG, num_warps=8, num_stages=2),),
    "gfx942": (Config(_SHORT, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
BACKWARD_CONFIGS = {
    "sm_80": (Config(_SHORT, num_warps=8, num_stages=2),),
    "sm_90": (Config(_SHORT, num_warps=8, num_stages=2),),
    "sm_100": (Config(_SHORT, num_warps=8, num_stages=2),),
    "gfx942": (Config(_SHORT, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
MIN_PROGRAMS = 512  # about four a multiprocessor: where dB and dC give fewer, the heads of a group are split


class Inputs(NamedTuple):
    """Arguments of kernels.ssd_scan as the kernels read them: rows of x, B, C dense, the others contiguous."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    initial: Tensor | None
    doc_ids: Tensor | None


class Plan(NamedTuple):
    """The launches of a pass, in order, and the tensors they leave its results in."""

    launches: list[Launch]
    results: tuple[Tensor, ...]


def plan_forward(inputs: Inputs, config: Config) -> Plan:
    """Results: y, the final state."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunk = config.tiles["CHUNK"]
    decays, cum, dt_bht = _plan_decays(dt, A, doc_ids, chunk)
    walk, states, final = _plan_states(x, B, cum, dt_bht, doc_ids, initial, config, reverse=False)
    y = x.new_empty(x.shape)
    chunks = states.shape[1]
    output = Launch(
        device.ssd_output_kernel,
        (chunks * h, b),
        {
            **_pointers(x=x, B=B, C=C, cum=cum, dt=dt_bht, D=D, doc_ids=doc_ids, states=states, y=y),
            **{"t": t, "h": h, "heads_a_group": h // g, "chunks": chunks},
            **_strides(x=x, B=B, C=C),
        },
        _tiles(p, n, config),
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + p) + n * p),
        bytes=_bytes(x, B, C, cum, dt_bht, D, doc_ids, states, y),
    )
    return Plan([decays, walk, output], (y, final))


def plan_backward(dy: Tensor, dfinal: Tensor | None, inputs: Inputs, config: Config) -> Plan:
    """Results: dx, ddt, parts of dA [b, chunks, h], of dB and dC [splits, b, t, g, n], of dD as of dA, dinitial."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunk, tiles = config.tiles["CHUNK"], _tiles(p, n, config)
    decays, cum, dt_bht = _plan_decays(dt, A, doc_ids, chunk)
    walk, states, _ = _plan_states(x, B, cum, dt_bht, doc_ids, initial, config, reverse=False)
    walk_back, dstates, dinitial = _plan_states(dy, C, cum, dt_bht, doc_ids, dfinal, config, reverse=True)
    chunks = states.shape[1]
    read = {"dy": dy, "x": x, "B": B, "C": C, "cum": cum, "dt": dt_bht, "doc_ids": doc_ids}
    read |= {"states": states, "dstates": dstates}
    strides = _strides(dy=dy, x=x, B=B, C=C)

    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = dt.new_empty(2, b, chunks, h).unbind()
    by_head = Launch(
        device.ssd_head_gradients_kernel,
        (chunks * h, b),
        {
            **_pointers(**read, A=A, D=D, dx=dx, ddt=ddt, dA=dA, dD=dD),
            **{"t": t, "h": h, "heads_a_group": h // g, "chunks": chunks, **strides},
        },
        tiles,
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + 2 * p + chunk) + 2 * n * p),
        bytes=_bytes(*read.values(), A, D, dx, ddt, dA, dD),
    )

    blocks = triton.cdiv(n, tiles["BLOCK_N"])
    splits = _head_splits(b * chunks * g * blocks, h // g)
    dB, dC = dt.new_empty(2, splits, b, t, g, n).unbind()
    by_group = Launch(
        device.ssd_group_gradients_kernel,
        (chunks * blocks, g * splits, b),
        {
            **_pointers(**read, dB=dB, dC=dC),
            **{"num_batch": b, "t": t, "h": h, "g": g, "splits": splits, "chunks": chunks, **strides},
        },
        tiles,
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * (h * (chunk * p * blocks + 2 * n * p) + 2 * g * splits * chunk * n),
        bytes=_bytes(*read.values(), dB, dC),
    )
    return Plan([decays, walk, walk_back, by_head, by_group], (dx, ddt, dA, dB, dC, dD, dinitial))


def plan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Launch, Tensor]:
    """The launch of one token's step, and where it leaves y."""
    b, h, p = x.shape
    g, n = B.shape[1:]
    y = x.new_empty(x.shape)
    launch = Launch(
        device.ssd_step_kernel,
        (triton.cdiv(p, 16), h, b),  # 16 channels: 8 KiB of a state of 128, and 2 048 programs from batch 16 on
        {**_pointers(x=x, dt=dt, A=A, B=B, C=C, D=D, state=state, y=y), "h": h, "heads_a_group": h // g},
        {"P": p, "N": n, "BLOCK_P": 16, "BLOCK_N": _block(n)},
        bytes=_bytes(x, dt, A, B, C, D, state, state, y),
    )
    return launch, y


def _plan_decays(dt: Tensor, A: Tensor, doc_ids: Tensor | None, chunk: int) -> tuple[Launch, Tensor, Tensor]:
    b, t, h = dt.shape
    chunks = triton.cdiv(t, chunk)
    cum, dt_bht = dt.new_empty(2, b, h, chunks * chunk).unbind()
    launch = Launch(
        device.ssd_decays_kernel,
        (chunks * h, b),
        {**_pointers(dt=dt, A=A, doc_ids=doc_ids, cum=cum, dt_bht=dt_bht), "t": t, "h": h, "padded_t": chunks * chunk},
        {"CHUNK": chunk},
        bytes=_bytes(dt, A, doc_ids, cum, dt_bht),
    )
    return launch, cum, dt_bht


def _plan_states(
    values: Tensor,
    maps: Tensor,
    cum: Tensor,
    dt: Tensor,
    doc_ids: Tensor | None,
    start: Tensor | None,
    config: Config,
    reverse: bool,
) -> tuple[Launch, Tensor, Tensor]:
    b, t, h, p = values.shape
    g, n = maps.shape[2:]
    chunk = config.tiles["CHUNK"]
    chunks = cum.shape[-1] // chunk
    states, end = values.new_empty(b, chunks, h, p, n), dt.new_empty(b, h, p, n)
    block_p, block_n = min(config.tiles["STATE_P"], _block(p)), min(config.tiles["STATE_N"], _block(n))
    launch = Launch(
        device.ssd_states_kernel,
        (triton.cdiv(p, block_p) * triton.cdiv(n, block_n), h, b),
        {
            **_pointers(values=values, maps=maps, cum=cum, dt=dt, doc_ids=doc_ids),
            **_pointers(start=start, states=states, end=end),
            **{"t": t, "h": h, "heads_a_group": h // g, "chunks": chunks},
            **_strides(values=values, maps=maps),
        },
        {"P": p, "N": n, "CHUNK": chunk, "BLOCK_P": block_p, "BLOCK_N": block_n, "REVERSE": reverse},
        num_warps=4,
        num_stages=3,  # a walk waits for memory: the next two chunks are on their way
        flops=2 * b * t * h * p * n,
        bytes=_bytes(values, maps, cum, dt, doc_ids, start, states, end),
    )
    return launch, states, end


def _tiles(p: int, n: int, config: Config) -> dict[str, int]:
    block_n = min(config.tiles["BLOCK_N"], _block(n))
    return {"P": p, "N": n, "CHUNK": config.tiles["CHUNK"], "BLOCK_P": _block(p), "BLOCK_N": block_n}


def _block(width: int) -> int:
    """A tile that holds the width; matrix instructions take no less than 16."""
    return max(16, int(triton.next_power_of_2(width)))


def _head_splits(programs: int, heads_a_group: int) -> int:
    splits = 1
    while programs * splits < MIN_PROGRAMS and heads_a_group % (2 * splits) == 0:
        splits *= 2
    return splits


def _pointers(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of the batch and of time, the axes that views of a wider projection stride over."""
    return {f"{name}_stride_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bt")}


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def representative_inputs(d_state: int, packed: bool) -> Inputs:
    """A layer of 2048 channels at 8 x 4096 positions, on meta tensors; packed: with documents and an initial state."""
    b, t, h, p, g = 8, 4096, 32, 64, 1
    x = torch.empty(b, t, h, p, dtype=torch.bfloat16, device="meta")
    dt, A = torch.empty(b, t, h, device="meta"), torch.empty(h, device="meta")
    B = x.new_empty(b, t, g, d_state)
    initial = dt.new_empty(b, h, p, d_state) if packed else None
    doc_ids = dt.new_empty(b, t, dtype=torch.int64) if packed else None
    return Inputs(x, dt, A, B, B, A, initial, doc_ids)
