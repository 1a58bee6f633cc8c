"""The launches of a pass of the SSD scan: tile sizes, grids, arguments, bytes and FLOPs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import INTERPRETER, Config
from kernels.ssd_scan import triton_kernels as device
from kernels.ssd_scan.reference import ScanInputs

# Tiles of a pass. CHUNK: positions a chunk; STATE_P, STATE_N: what one walk carries; BLOCK_N: state columns a step of
# the kernels that take all of them; GROUP_N: those that one program leaves dB and dC of. Warps and stages are not the
# walks'. On sm_80 and sm_90 a warp takes 16 rows of a chunk: more than CHUNK / 16 would compute rows twice.
_SHORT = {"CHUNK": 64, "BLOCK_N": 64, "GROUP_N": 64, "STATE_P": 64, "STATE_N": 64}
_LONG = {**_SHORT, "CHUNK": 128}
_INTERPRETER = (Config(dict.fromkeys(_SHORT, 16)),)
FORWARD_CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_80": (Config(_SHORT, num_warps=4, num_stages=2),),
    "sm_90": (Config(_LONG, num_warps=8, num_stages=2),),
    "sm_100": (Config(_LONG, num_warps=8, num_stages=2),),
    "gfx942": (Config(_SHORT, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
BACKWARD_CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_80": (Config({**_SHORT, "BLOCK_N": 32}, num_warps=4, num_stages=2),),
    "sm_90": (Config(_SHORT, num_warps=4, num_stages=2),),
    "sm_100": (Config(_SHORT, num_warps=8, num_stages=2),),
    "gfx942": (Config(_SHORT, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
# Full float32 products run on scalar units from registers: larger tiles would spill, and compile for half a minute.
_FLOAT32 = (Config({**dict.fromkeys(_SHORT, 32), "STATE_P": 64}, num_warps=4, num_stages=1),)
MIN_PROGRAMS = 512  # about four a multiprocessor: where dB and dC give fewer, the heads of a group are split


def candidates(configs: dict[str, tuple[Config, ...]], arch: str, dtype: torch.dtype) -> tuple[Config, ...]:
    """What to choose from for inputs of a dtype, the default first."""
    return _FLOAT32 if dtype == torch.float32 and arch != INTERPRETER else configs[arch]


class Plan(NamedTuple):
    """The launches of a pass, in order, and the tensors they leave its results in."""

    launches: list[Launch]
    results: tuple[Tensor, ...]


def plan_forward(inputs: ScanInputs, config: Config) -> Plan:
    """Results: y, the final state. Rows of x, B and C are dense, the other inputs contiguous."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunk = config.tiles["CHUNK"]
    sum_up, decays = _plan_decays(dt, A, doc_ids, chunk)
    walk, states, final = _plan_states(x, B, decays, initial, config, reverse=False)
    y = x.new_empty(x.shape)
    chunks = states.shape[1]
    output = Launch(
        device.ssd_output_kernel,
        (chunks * h, b),
        {
            **_pointers(x=x, B=B, C=C, cum=decays.cum, dt=decays.dt, reach=decays.reach, D=D, begin=decays.begin),
            **_pointers(states=states, y=y),
            **{"t": t, "h": h, "heads_per_group": h // g, "chunks": chunks},
            **_strides(x=x, B=B, C=C),
        },
        _tiles(p, n, config),
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + p) + n * p),
        bytes=num_bytes(x, B, C, decays.cum, decays.dt, decays.reach, D, decays.begin, states, y),
    )
    return Plan([sum_up, walk, output], (y, final))


def plan_backward(dy: Tensor, dfinal: Tensor | None, inputs: ScanInputs, config: Config) -> Plan:
    """Results: dx, ddt, parts of dA [b, chunks, h], of dB and dC [splits, b, t, g, n], of dD as of dA, dinitial."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunk, tiles = config.tiles["CHUNK"], _tiles(p, n, config)
    sum_up, decays = _plan_decays(dt, A, doc_ids, chunk)
    walk, states, _ = _plan_states(x, B, decays, initial, config, reverse=False)
    walk_back, dstates, dinitial = _plan_states(dy, C, decays, dfinal, config, reverse=True)
    chunks = states.shape[1]
    read = {"dy": dy, "x": x, "B": B, "C": C, **decays._asdict(), "states": states, "dstates": dstates}
    strides = _strides(dy=dy, x=x, B=B, C=C)

    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = dt.new_empty(2, b, chunks, h).unbind()
    by_head = Launch(
        device.ssd_head_gradients_kernel,
        (chunks * h, b),
        {
            **_pointers(**read, A=A, D=D, dx=dx, ddt=ddt, dA=dA, dD=dD),
            **{"t": t, "h": h, "heads_per_group": h // g, "chunks": chunks, **strides},
        },
        tiles,
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + 2 * p + chunk) + 2 * n * p),
        bytes=num_bytes(*read.values(), A, D, dx, ddt, dA, dD),
    )

    group_n = min(config.tiles["GROUP_N"], _block(n))
    blocks = triton.cdiv(n, group_n)
    splits = _head_splits(b * chunks * g * blocks, h // g)
    dB, dC = dt.new_empty(2, splits, b, t, g, n).unbind()
    by_group = Launch(
        device.ssd_group_gradients_kernel,
        (chunks * blocks, g * splits, b),
        {
            **_pointers(**read, dB=dB, dC=dC),
            **{"num_batch": b, "t": t, "h": h, "g": g, "splits": splits, "chunks": chunks, **strides},
        },
        {**tiles, "BLOCK_N": group_n},
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * (h * (chunk * p * blocks + 2 * n * p) + 2 * g * splits * chunk * n),
        bytes=num_bytes(*read.values(), dB, dC),
    )
    return Plan([sum_up, walk, walk_back, by_head, by_group], (dx, ddt, dA, dB, dC, dD, dinitial))


class Decays(NamedTuple):
    """What ssd_decays_kernel leaves to the others: [b, h, padded t], and begin [b, padded t] if there are documents."""

    cum: Tensor
    dt: Tensor
    reach: Tensor
    to_end: Tensor
    begin: Tensor | None


def _plan_decays(dt: Tensor, A: Tensor, doc_ids: Tensor | None, chunk: int) -> tuple[Launch, Decays]:
    b, t, h = dt.shape
    padded_t = triton.cdiv(t, chunk) * chunk
    begin = None if doc_ids is None else dt.new_empty(b, padded_t, dtype=torch.int32)
    cum, dt_bht, reach, to_end = dt.new_empty(4, b, h, padded_t)
    decays = Decays(cum, dt_bht, reach, to_end, begin)
    launch = Launch(
        device.ssd_decays_kernel,
        (padded_t // chunk * h, b),
        {
            **_pointers(dt=dt, A=A, doc_ids=doc_ids, cum=cum, dt_bht=dt_bht, reach=reach, to_end=to_end, begin=begin),
            **{"t": t, "h": h, "padded_t": padded_t},
        },
        {"CHUNK": chunk},
        num_warps=max(1, chunk // 16),
        bytes=num_bytes(dt, A, doc_ids, *decays),
    )
    return launch, decays


def _plan_states(
    values: Tensor, maps: Tensor, decays: Decays, start: Tensor | None, config: Config, reverse: bool
) -> tuple[Launch, Tensor, Tensor]:
    """The walk, and where it leaves the states it comes to each chunk with, and the one it ends with."""
    b, t, h, p = values.shape
    g, n = maps.shape[2:]
    chunk = config.tiles["CHUNK"]
    chunks = decays.cum.shape[-1] // chunk
    weight, dt = (decays.reach, None) if reverse else (decays.to_end, decays.dt)
    states, end = values.new_empty(b, chunks, h, p, n), decays.cum.new_empty(b, h, p, n)
    block_p, block_n = min(config.tiles["STATE_P"], _block(p)), min(config.tiles["STATE_N"], _block(n))
    launch = Launch(
        device.ssd_states_kernel,
        (triton.cdiv(p, block_p) * triton.cdiv(n, block_n), h, b),
        {
            **_pointers(values=values, maps=maps, weight=weight, dt=dt, reach=decays.reach),
            **_pointers(start=start, states=states, end=end),
            **{"t": t, "h": h, "heads_per_group": h // g, "chunks": chunks},
            **_strides(values=values, maps=maps),
        },
        {"P": p, "N": n, "CHUNK": chunk, "BLOCK_P": block_p, "BLOCK_N": block_n, "REVERSE": reverse},
        num_warps=4,
        num_stages=3,  # a walk waits for memory: the next two chunks are on their way
        flops=2 * b * t * h * p * n,
        bytes=num_bytes(values, maps, weight, dt, start, states, end),
    )
    return launch, states, end


def _tiles(p: int, n: int, config: Config) -> dict[str, int]:
    block_n = min(config.tiles["BLOCK_N"], _block(n))
    return {"P": p, "N": n, "CHUNK": config.tiles["CHUNK"], "BLOCK_P": _block(p), "BLOCK_N": block_n}


def _block(width: int) -> int:
    """A tile that holds the width; matrix instructions take no less than 16."""
    return max(16, int(triton.next_power_of_2(width)))


def _head_splits(programs: int, heads_per_group: int) -> int:
    splits = 1
    while programs * splits < MIN_PROGRAMS and heads_per_group % (2 * splits) == 0:
        splits *= 2
    return splits


def _pointers(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of the batch and of time, the axes that views of a wider projection stride over."""
    return {f"{name}_stride_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bt")}


def representative_inputs(d_state: int, packed: bool) -> ScanInputs:
    """A layer of 2048 channels at 8 x 4096 positions, on meta tensors; packed: with documents and an initial state."""
    b, t, h, p, g = 8, 4096, 32, 64, 1
    x = torch.empty(b, t, h, p, dtype=torch.bfloat16, device="meta")
    dt, A = torch.empty(b, t, h, device="meta"), torch.empty(h, device="meta")
    B = x.new_empty(b, t, g, d_state)
    initial = dt.new_empty(b, h, p, d_state) if packed else None
    doc_ids = dt.new_empty(b, t, dtype=torch.int64) if packed else None
    return ScanInputs(x, dt, A, B, B, A, initial, doc_ids)
