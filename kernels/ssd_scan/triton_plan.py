"""The launches of a pass of the SSD scan: tile sizes, grids, arguments, bytes and FLOPs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import INTERPRETER, Config
from kernels.ssd_scan import triton_backward, triton_forward, triton_states
from kernels.ssd_scan.reference import ScanInputs

# Tiles of a pass. CHUNK: positions per chunk. BLOCK_N: state columns per step of the kernels that take all of them; if
# it covers d_state, B and C stay for all heads of a program. GROUP_N: columns that one program leaves dB and dC of.
# STATE_P, STATE_N: what one walk carries. WALKS: how many run at once, about three per multiprocessor. Warps and
# stages are not the walks'. On sm_80 and sm_90 a warp takes 16 rows: more than CHUNK / 16 would compute rows twice.
_NARROW = {"CHUNK": 64, "BLOCK_N": 64, "GROUP_N": 64, "STATE_P": 64, "STATE_N": 64, "WALKS": 396}
_WIDE = {**_NARROW, "BLOCK_N": 128, "STATE_N": 128}
_INTERPRETER = (Config(dict.fromkeys(_NARROW, 16)),)
FORWARD_CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_80": (Config(_NARROW, num_warps=4, num_stages=2),),
    "sm_90": (Config(_WIDE, num_warps=4, num_stages=3), Config(_WIDE, num_warps=4, num_stages=2)),
    "sm_100": (Config(_WIDE, num_warps=4, num_stages=3),),
    "gfx942": (Config(_NARROW, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
BACKWARD_CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_80": (Config({**_NARROW, "BLOCK_N": 32}, num_warps=4, num_stages=2),),
    "sm_90": (Config({**_WIDE, "GROUP_N": 128}, num_warps=4, num_stages=2),),
    "sm_100": (Config(_WIDE, num_warps=4, num_stages=2),),
    "gfx942": (Config(_NARROW, num_warps=4, num_stages=1),),
    INTERPRETER: _INTERPRETER,
}
# Full float32 products run on scalar units from registers: larger tiles would spill, and compile for half a minute.
_FLOAT32 = (Config({**dict.fromkeys(_NARROW, 32), "STATE_P": 64, "WALKS": 396}, num_warps=4, num_stages=1),)
MIN_PROGRAMS = 512  # about four per multiprocessor: if chunks and groups give fewer, the heads of a group are split

MAX_STATE_TILE = 64 * 128  # elements: more would spill


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
    chunk, tiles = config.tiles["CHUNK"], _tiles(p, n, config)
    sum_up, decays = _plan_decays(dt, A, doc_ids, chunk)
    walks, states, final = _plan_states(x, B, decays, initial, config, reverse=False)
    y = x.new_empty(x.shape)
    chunks = states.shape[1]
    heads = _heads_in_turn(b * chunks * g, h // g) if n <= tiles["BLOCK_N"] else 1
    output = Launch(
        triton_forward.ssd_output_kernel,
        (chunks, h // heads, b),
        {
            **_pointers(x=x, B=B, C=C, cum=decays.cum, dt=decays.dt, reach=decays.reach, D=D, begin=decays.begin),
            **_pointers(states=states, y=y),
            **{"t": t, "chunks": chunks},
            **_strides("b", x=x, B=B, C=C),
        },
        {**_strides("t", x=x, B=B, C=C), "H": h, "G": g, "HEADS": heads, **tiles},
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + p) + n * p),
        bytes=num_bytes(x, B, C, decays.cum, decays.dt, decays.reach, D, decays.begin, states, y),
    )
    return Plan([sum_up, *walks, output], (y, final))


def plan_backward(dy: Tensor, dfinal: Tensor | None, inputs: ScanInputs, config: Config) -> Plan:
    """Results: dx, ddt, parts of dA [b, chunks, h], of dB and dC [splits, b, t, g, n], of dD as of dA, dinitial."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunk, tiles = config.tiles["CHUNK"], _tiles(p, n, config)
    sum_up, decays = _plan_decays(dt, A, doc_ids, chunk)
    walks, states, _ = _plan_states(x, B, decays, initial, config, reverse=False)
    walks_back, dstates, dinitial = _plan_states(dy, C, decays, dfinal, config, reverse=True)
    chunks = states.shape[1]
    read = {"dy": dy, "x": x, "B": B, "C": C, **decays._asdict(), "states": states, "dstates": dstates}
    strides = _strides("b", dy=dy, x=x, B=B, C=C)
    constants = {**_strides("t", dy=dy, x=x, B=B, C=C), "H": h, "G": g, **tiles}

    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = dt.new_empty(2, b, chunks, h).unbind()
    heads = _heads_in_turn(b * chunks * g, h // g) if n <= tiles["BLOCK_N"] else 1
    by_head = Launch(
        triton_backward.ssd_head_gradients_kernel,
        (chunks, h // heads, b),
        {
            **_pointers(**read, A=A, D=D, dx=dx, ddt=ddt, dA=dA, dD=dD),
            **{"t": t, "chunks": chunks, **strides},
        },
        {**constants, "HEADS": heads},
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * h * (chunk * (n + 2 * p + chunk) + 2 * n * p),
        bytes=num_bytes(*read.values(), A, D, dx, ddt, dA, dD),
    )

    group_n = min(config.tiles["GROUP_N"], _block(n))
    blocks = triton.cdiv(n, group_n)
    heads = _heads_in_turn(b * chunks * g * blocks, h // g)
    splits = h // g // heads
    summed = B.dtype if splits == 1 else torch.float32  # sums of parts are for the caller
    dB, dC = (dt.new_empty(splits, b, t, g, n, dtype=summed) for _ in range(2))
    by_group = Launch(
        triton_backward.ssd_group_gradients_kernel,
        (chunks * blocks, h // heads, b),
        {
            **_pointers(**read, dB=dB, dC=dC),
            **{"t": t, "chunks": chunks, **strides},
        },
        {**constants, "HEADS": heads, "BLOCK_N": group_n},
        config.num_warps,
        config.num_stages,
        flops=2 * b * t * (h * (chunk * p * blocks + 2 * n * p) + 2 * g * splits * chunk * n),
        bytes=num_bytes(*read.values(), dB, dC),
    )
    return Plan([sum_up, *walks, *walks_back, by_head, by_group], (dx, ddt, dA, dB, dC, dD, dinitial))


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
        triton_states.ssd_decays_kernel,
        (padded_t // chunk * h, b),
        {
            **_pointers(dt=dt, A=A, doc_ids=doc_ids, cum=cum, dt_bht=dt_bht, reach=reach, to_end=to_end, begin=begin),
            **{"t": t, "padded_t": padded_t},
        },
        {"H": h, "CHUNK": chunk},
        num_warps=max(1, chunk // 64),  # a thread sums up one position or two: no exchanges
        bytes=num_bytes(dt, A, doc_ids, *decays),
    )
    return launch, decays


class States(NamedTuple):
    """The launches of a recurrence; where they leave the state before each chunk [b, chunks, h, p, n] and the last."""

    launches: list[Launch]
    states: Tensor
    end: Tensor


def _plan_states(
    values: Tensor, maps: Tensor, decays: Decays, start: Tensor | None, config: Config, reverse: bool
) -> States:
    """Walks over all chunks if those are enough; else walks over segments, first for their ends alone."""
    b, t, h, p = values.shape
    g, n = maps.shape[2:]
    chunk = config.tiles["CHUNK"]
    chunks = decays.cum.shape[-1] // chunk
    weight, dt = (decays.reach, None) if reverse else (decays.to_end, decays.dt)
    block_p, block_n = min(config.tiles["STATE_P"], _block(p)), min(config.tiles["STATE_N"], _block(n))
    blocks = triton.cdiv(p, block_p) * triton.cdiv(n, block_n)
    chunks_per_segment = triton.cdiv(chunks, max(1, config.tiles["WALKS"] // (b * h * blocks)))
    segments = triton.cdiv(chunks, chunks_per_segment)
    states, end = values.new_empty(b, chunks, h, p, n), decays.cum.new_empty(b, h, p, n)

    def walk(starts: Tensor | None, states: Tensor | None, ends: Tensor | None, carries: Tensor | None) -> Launch:
        return Launch(
            triton_states.ssd_states_kernel,
            (blocks * segments, h, b),
            {
                **_pointers(values=values, maps=maps, weight=weight, dt=dt, reach=decays.reach),
                **_pointers(starts=starts, states=states, ends=ends, carries=carries),
                **{"t": t, "chunks": chunks, "chunks_per_segment": chunks_per_segment},
                **_strides("b", values=values, maps=maps),
            },
            {
                **_strides("t", values=values, maps=maps),
                **{"H": h, "G": g, "P": p, "N": n, "CHUNK": chunk},
                **{"BLOCK_P": block_p, "BLOCK_N": block_n, "REVERSE": reverse},
            },
            num_warps=4,
            num_stages=3,  # a walk waits for memory: the next two chunks are on their way
            flops=2 * b * t * h * p * n,
            bytes=num_bytes(values, maps, weight, dt, starts, states, ends, carries),
        )

    if segments == 1:
        return States([walk(start, states, end, None)], states, end)
    starts, ends = decays.cum.new_empty(2, b, segments, h, p, n).unbind()
    carries = decays.cum.new_empty(b, segments, h)
    join = Launch(
        triton_states.ssd_segments_kernel,
        (triton.cdiv(p * n, 512), h, b),
        {
            **_pointers(ends=ends, carries=carries, start=start, starts=starts, end=end),
            "segments": segments,
        },
        {"H": h, "STATE": p * n, "BLOCK": 512, "REVERSE": reverse},
        bytes=num_bytes(ends, carries, start, starts, end),
    )
    return States([walk(None, None, ends, carries), join, walk(starts, states, None, None)], states, end)


def _tiles(p: int, n: int, config: Config) -> dict[str, int]:
    block_p = _block(p)
    block_n = min(config.tiles["BLOCK_N"], _block(n), MAX_STATE_TILE // block_p)
    return {"P": p, "N": n, "CHUNK": config.tiles["CHUNK"], "BLOCK_P": block_p, "BLOCK_N": block_n}


def _block(width: int) -> int:
    """A tile that holds the width; matrix instructions take no less than 16."""
    return max(16, int(triton.next_power_of_2(width)))


def _heads_in_turn(programs: int, heads_per_group: int) -> int:
    """As many heads of a group for each program as leave MIN_PROGRAMS programs; programs: if all are taken in turn."""
    divisors = [heads for heads in range(heads_per_group, 0, -1) if heads_per_group % heads == 0]
    return next((heads for heads in divisors if programs * heads_per_group // heads >= MIN_PROGRAMS), 1)


def _pointers(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _strides(axis: Literal["b", "t"], **tensors: Tensor) -> dict[str, int]:
    """Of an axis that views of a wider projection stride over; that of time is a constant of the kernel."""
    return {f"{name}_stride_{axis}": x.stride("bt".index(axis)) for name, x in tensors.items()}


def representative_inputs(d_state: int, packed: bool) -> ScanInputs:
    """A layer of 2048 channels at 8 x 4096 positions, on meta tensors; packed: with documents and an initial state."""
    b, t, h, p, g = 8, 4096, 32, 64, 1
    x = torch.empty(b, t, h, p, dtype=torch.bfloat16, device="meta")
    dt, A = torch.empty(b, t, h, device="meta"), torch.empty(h, device="meta")
    B = x.new_empty(b, t, g, d_state)
    initial = dt.new_empty(b, h, p, d_state) if packed else None
    doc_ids = dt.new_empty(b, t, dtype=torch.int64) if packed else None
    return ScanInputs(x, dt, A, B, B, A, initial, doc_ids)
