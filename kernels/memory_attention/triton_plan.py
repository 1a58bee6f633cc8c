"""The launches of memory attention, planned from shapes alone. Tiling: README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import INTERPRETER, Config, choose
from kernels.memory_attention.reference import FlatInputs
from kernels.memory_attention.triton_backward import (
    key_grad_kernel,
    query_grad_kernel,
    slot_grad_kernel,
    sum_slots_kernel,
)
from kernels.memory_attention.triton_forward import forward_kernel

LOG2_E = math.log2(math.e)
MAX_COLUMNS = 256  # of sum_slots_kernel's programs
MIN_SIDE = 16  # of a matrix product
MAX_SLOTS = 32  # read together: more would take registers that the loops over keys do not need
WITHOUT_COPY_ENGINE = ("sm_80", "gfx942")  # there Triton expands descriptors to many more instructions
ALIGNED_BYTES = 16  # addresses and strides of what the copy engine takes tiles of
Pair = tuple[Tensor, Tensor]  # mostly keys and values, or their gradients


def _config(block_q: int, block_k: int, num_warps: int, num_stages: int, max_registers: int | None = None) -> Config:
    return Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, num_warps, num_stages, max_registers)


# By kernel, architecture and bytes of a head's row: tiles, the first being the default, whose registers do not spill
# (`make kernel-report`). On sm_90 it is what an H200 was fastest with. With documents the forward and query_grad would
# take more registers than the limits there, and a block less would fit. Wide key tiles for key_grad on sm_100 halve how
# often it reads a query.
CONFIGS: dict[str, dict[str, dict[int, tuple[Config, ...]]]] = {
    "forward": {
        "sm_80": {
            128: (_config(128, 64, 8, 2), _config(64, 64, 4, 2)),
            256: (_config(128, 32, 8, 2), _config(64, 32, 4, 3)),
        },
        "sm_90": {
            128: (_config(64, 64, 4, 2, 128), _config(64, 64, 4, 3, 128)),
            256: (_config(128, 64, 8, 3), _config(64, 64, 4, 2)),
        },
        "sm_100": {
            128: (_config(128, 64, 8, 3), _config(64, 64, 4, 3)),
            256: (_config(128, 64, 8, 3), _config(64, 64, 4, 2)),
        },
        "gfx942": {
            128: (_config(128, 64, 4, 1), _config(128, 32, 4, 1)),
            256: (_config(128, 32, 4, 1),),
        },
        INTERPRETER: {128: (_config(16, 16, 4, 1),)},
    },
    "query_grad": {
        "sm_80": {128: (_config(64, 32, 4, 2),), 256: (_config(64, 32, 4, 2),)},
        "sm_90": {
            128: (_config(64, 64, 4, 3, 168), _config(64, 32, 4, 4)),
            256: (_config(128, 64, 8, 2), _config(64, 64, 4, 2)),
        },
        "sm_100": {
            128: (_config(64, 64, 4, 2), _config(128, 64, 8, 2)),
            256: (_config(128, 64, 8, 2), _config(64, 64, 4, 2)),
        },
        "gfx942": {128: (_config(64, 64, 4, 1), _config(64, 32, 4, 1)), 256: (_config(64, 32, 4, 1),)},
        INTERPRETER: {128: (_config(16, 16, 4, 1),)},
    },
    "key_grad": {
        "sm_80": {128: (_config(32, 64, 4, 2),), 256: (_config(32, 64, 4, 2),)},
        "sm_90": {
            128: (_config(64, 64, 4, 2, 168), _config(32, 64, 4, 2, 128)),
            256: (_config(32, 64, 4, 2), _config(32, 128, 8, 2)),
        },
        "sm_100": {
            128: (_config(64, 128, 8, 2), _config(64, 64, 4, 2)),
            256: (_config(64, 128, 8, 2), _config(64, 64, 4, 2)),
        },
        "gfx942": {128: (_config(32, 64, 4, 1),), 256: (_config(32, 64, 4, 1),)},
        INTERPRETER: {128: (_config(16, 16, 4, 1),)},
    },
    "slot_grad": {
        "sm_80": {128: (_config(32, 64, 4, 2),), 256: (_config(32, 64, 4, 2),)},
        "sm_90": {
            128: (_config(64, 64, 4, 3), _config(32, 64, 4, 3)),
            256: (_config(32, 64, 4, 2), _config(32, 128, 8, 2)),
        },
        "sm_100": {
            128: (_config(64, 128, 8, 2), _config(64, 64, 4, 2)),
            256: (_config(64, 128, 8, 2), _config(64, 64, 4, 2)),
        },
        "gfx942": {128: (_config(32, 64, 4, 1),), 256: (_config(32, 64, 4, 1),)},
        INTERPRETER: {128: (_config(16, 16, 4, 1),)},
    },
}


class Saved(NamedTuple):
    """Tensors of the backward besides the inputs; delta, sum(grad_out * out), is written by query_grad_kernel."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    delta: Tensor


class SetGradients(NamedTuple):
    """Gradients of FlatInputs.sets."""

    q: Tensor
    k: Tensor
    v: Tensor
    fading_k: Tensor | None
    fading_v: Tensor | None
    eidetic_q: Tensor | None
    eidetic_k: Tensor | None
    eidetic_v: Tensor | None


def num_chunks(inputs: FlatInputs) -> int:
    return -(-inputs.num_queries // inputs.chunk_size)


def num_pairs(inputs: FlatInputs) -> int:
    """Pairs of a query row and a key it reads, in all sets, were there one document."""
    pairs = band_pairs(inputs, 0, inputs.k) + inputs.num_queries * inputs.num_slots
    if inputs.fading_k is not None:
        pairs += band_pairs(inputs, inputs.window_size, inputs.fading_k)
    return inputs.q.shape[0] * inputs.q.shape[2] * pairs


def band_pairs(inputs: FlatInputs, age: int, k: Tensor) -> int:
    """Pairs of one head in the window (age 0) or the fading memory (age W)."""

    def read_by_first(num_positions: int) -> int:
        growing = min(max(num_positions, 0), inputs.window_size)
        return growing * (growing + 1) // 2 + (max(num_positions, 0) - growing) * inputs.window_size

    past = min(inputs.num_past, rows_before(inputs, k, age)) - age
    return read_by_first(past + inputs.num_queries) - read_by_first(past)


def rows_before(inputs: FlatInputs, k: Tensor, age: int) -> int:
    """Key rows of the window (age 0) or the fading memory (age W) that lie before the first query's position."""
    return k.shape[1] - inputs.num_queries + age


def slot_values(inputs: FlatInputs) -> Tensor:
    return inputs.v if inputs.eidetic_v is None else inputs.eidetic_v


def query_tiles(inputs: FlatInputs, config: Config) -> int:
    """Number of tiles; none crosses a chunk boundary."""
    positions = config.tiles["BLOCK_Q"] // inputs.group
    full_chunks = num_chunks(inputs) - 1
    last = inputs.num_queries - full_chunks * inputs.chunk_size
    return full_chunks * -(-inputs.chunk_size // positions) - (-last // positions)


def row_bytes(q: Tensor) -> int:
    """Bytes of a head's row in CONFIGS; float32 counts twice, because its products are summed without tensor cores."""
    return q.shape[-1] * q.element_size() * (2 if q.dtype == torch.float32 else 1)


def candidates(kernel: str, arch: str, width: int) -> list[Config]:
    """CONFIGS for a head's row; rows wider than any there get tiles smaller in proportion."""
    widths = CONFIGS[kernel][arch]
    known = min((known for known in widths if known >= width), default=max(widths))
    shrink = max(1, width // known)
    return [
        replace(config, tiles={name: max(MIN_SIDE, size // shrink) for name, size in config.tiles.items()})
        for config in widths[known]
    ]


@torch.compiler.assume_constant_result  # torch.compile need not trace how tiles are looked up; torch 2.11 cannot
def most_query_heads(width: int, arch: str) -> int:
    """Query heads per key/value head that every query tile can hold."""
    kernels = ("forward", "query_grad")
    return min(config.tiles["BLOCK_Q"] for kernel in kernels for config in candidates(kernel, arch, width))


def pick(kernel: str, arch: str, inputs: FlatInputs, plan: Callable[[Config], Sequence[Launch]]) -> Config:
    key = (inputs.q.dtype, inputs.q.shape[3], inputs.group, inputs.num_slots, inputs.fading_k is not None)
    found = candidates(kernel, arch, row_bytes(inputs.q))
    return choose(f"memory_attention.{kernel}", arch, found, key, plan)


def plan_forward(inputs: FlatInputs, out: Tensor, lse: Tensor, arch: str) -> list[Launch]:
    """Write out [b, t, h, p] and lse, as new_lse makes it."""

    def plan(config: Config) -> list[Launch]:
        return [
            Launch(
                forward_kernel,
                (query_tiles(inputs, config), inputs.k.shape[2], inputs.q.shape[0]),
                _set_args(inputs, config, arch) | strided(out=out) | {"lse_ptr": lse, "lse_strides": _by_time(lse)},
                _set_constants(inputs, config),
                config.num_warps,
                config.num_stages,
                config.max_registers,
                flops=4 * inputs.q.shape[3] * num_pairs(inputs),
                bytes=num_bytes(out, lse, *inputs.tensors),
            )
        ]

    return plan(pick("forward", arch, inputs, plan))


def plan_backward(inputs: FlatInputs, saved: Saved, grads: SetGradients, arch: str) -> list[Launch]:
    """Fill the gradients, in this order: one needs delta, and the slots' may be added to the window's values'."""
    launches = plan_query_grad(inputs, saved, grads.q, grads.eidetic_q, arch)
    launches += plan_key_grad(inputs, saved, 0, (inputs.k, inputs.v), (grads.k, grads.v), arch)
    if inputs.fading_k is not None:
        fading, of_fading = _pair(inputs.fading_k, inputs.fading_v), _pair(grads.fading_k, grads.fading_v)
        launches += plan_key_grad(inputs, saved, inputs.window_size, fading, of_fading, arch)
    if inputs.index_bjm is not None:
        shape = (inputs.q.shape[0], num_chunks(inputs) * inputs.num_slots, *inputs.k.shape[2:])
        slot_grads = inputs.q.new_empty(shape), inputs.q.new_empty(shape)
        launches += plan_slot_grad(inputs, saved, slot_grads, grads, arch)
    return launches


def plan_query_grad(
    inputs: FlatInputs, saved: Saved, grad_q: Tensor, grad_eidetic_q: Tensor | None, arch: str
) -> list[Launch]:
    """Write saved.delta and the gradients of both kinds of queries, [b, t, h, p]."""
    written = {"delta_ptr": saved.delta, "grad_q_ptr": grad_q, "grad_eidetic_q_ptr": grad_eidetic_q}
    read = strided(out=saved.out, grad_out=saved.grad_out) | {
        "lse_ptr": saved.lse,
        "lse_strides": _by_time(saved.lse),
        "scale": inputs.scale,
    }

    def plan(config: Config) -> list[Launch]:
        return [
            Launch(
                query_grad_kernel,
                (query_tiles(inputs, config), inputs.k.shape[2], inputs.q.shape[0]),
                _set_args(inputs, config, arch) | read | written,
                _set_constants(inputs, config),
                config.num_warps,
                config.num_stages,
                config.max_registers,
                flops=6 * inputs.q.shape[3] * num_pairs(inputs),
                bytes=num_bytes(*saved, grad_q, grad_eidetic_q, *inputs.tensors),
            )
        ]

    return plan(pick("query_grad", arch, inputs, plan))


def plan_key_grad(
    inputs: FlatInputs, saved: Saved, age: int, keys_values: Pair, grads: Pair, arch: str
) -> list[Launch]:
    """Write the gradients of the window's keys and values (age 0) or the fading memory's (age W)."""
    k, v = keys_values
    args = strided(k=k, v=v) | {
        "window_size": inputs.window_size,
        "age": age,
        "lowest": lowest_place(inputs, k, age),
        "rows_before": k.shape[1] - inputs.num_queries,
    }

    def plan(config: Config) -> list[Launch]:
        rows = config.tiles["BLOCK_K"]
        tiles = {"grad_k_tiles": tiles_of(grads[0], rows, arch), "grad_v_tiles": tiles_of(grads[1], rows, arch)}
        return [
            Launch(
                key_grad_kernel,
                (-(-k.shape[1] // rows), k.shape[2], k.shape[0]),
                args | tiles | _query_tiles(inputs, inputs.q, saved, config, arch),
                {"GROUP": inputs.group, "P": inputs.q.shape[3], **config.tiles},
                config.num_warps,
                config.num_stages,
                config.max_registers,
                flops=8 * inputs.q.shape[3] * inputs.q.shape[0] * inputs.q.shape[2] * band_pairs(inputs, age, k),
                bytes=num_bytes(inputs.q, saved.grad_out, saved.lse, saved.delta, *keys_values, *grads),
            )
        ]

    return plan(pick("key_grad", arch, inputs, plan))


def plan_slot_grad(inputs: FlatInputs, saved: Saved, slot_grads: Pair, grads: SetGradients, arch: str) -> list[Launch]:
    """Write the gradients of the eidetic keys and values; add those of values that are the window's to grads.v.

    Rows that are in no slot are left as they are.

    Args: slot_grads: buffers [b, chunks x M, kv heads, p] for what each chunk gives to each of its slots.
    """
    q, index = _pair(inputs.eidetic_q, inputs.index_bjm)
    k, v = _pair(inputs.eidetic_k, slot_values(inputs))
    args = strided(k=k, v=v, grad_k=slot_grads[0]) | {
        "grad_v_ptr": slot_grads[1],
        "index_ptr": index,
        "chunk_size": inputs.chunk_size,
        "num_chunks": index.shape[1],
    }

    def plan(config: Config) -> list[Launch]:
        tiles = -(-inputs.num_slots // config.tiles["BLOCK_K"])
        return [
            Launch(
                slot_grad_kernel,
                (num_chunks(inputs) * tiles, k.shape[2], k.shape[0]),
                args | _query_tiles(inputs, q, saved, config, arch),
                {"NUM_SLOTS": inputs.num_slots, "GROUP": inputs.group, "P": inputs.q.shape[3], **config.tiles},
                config.num_warps,
                config.num_stages,
                config.max_registers,
                flops=8
                * inputs.q.shape[3]
                * inputs.q.shape[0]
                * inputs.q.shape[2]
                * inputs.num_queries
                * inputs.num_slots,
                bytes=num_bytes(q, saved.grad_out, saved.lse, saved.delta, index, *slot_grads, *slot_grads),
            )
        ]

    index_bjm = index[:, : num_chunks(inputs)]
    return [*plan(pick("slot_grad", arch, inputs, plan)), _plan_sum(index_bjm, slot_grads, grads)]


def _plan_sum(index_bjm: Tensor, slot_grads: Pair, grads: SetGradients) -> Launch:
    """Sum the entries of each row, in the order of the chunks."""
    grad_k, grad_v = _pair(grads.eidetic_k, grads.v if grads.eidetic_v is None else grads.eidetic_v)
    batch, num_rows, kv_heads, head_dim = grad_k.shape
    entry_row = index_bjm.reshape(batch, -1)
    entry_row = torch.where(entry_row >= 0, entry_row, num_rows)
    entry_row = entry_row.to(torch.int16 if num_rows < 2**15 else torch.int32)  # short keys are sorted faster
    sorted_row, order = torch.sort(entry_row, stable=True)
    width = kv_heads * head_dim
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())
    return Launch(
        sum_slots_kernel,
        (entry_row.shape[1], -(-width // block), batch),
        {
            "slot_grad_k_ptr": slot_grads[0],
            "slot_grad_v_ptr": slot_grads[1],
            "order_ptr": order,
            "row_ptr": sorted_row,
            "grad_k_ptr": grad_k,
            "grad_v_ptr": grad_v,
            "num_rows": num_rows,
            "num_entries": entry_row.shape[1],
            "width": width,
        },
        {"ADDS_V": grads.eidetic_v is None, "BLOCK": block, "ENTRIES": 4},
        num_warps=max(1, block // 128),
        bytes=num_bytes(*slot_grads, order, sorted_row) + slot_grads[0].numel() * 2 * grad_k.element_size(),
    )


def strided(**tensors: Tensor | None) -> dict[str, Any]:
    """Arguments x_ptr and x_strides, of batch, time and head, for tensors [b, t, h, ...]."""
    pointers: dict[str, Any] = {f"{name}_ptr": x for name, x in tensors.items()}
    return pointers | {f"{name}_strides": None if x is None else x.stride()[:3] for name, x in tensors.items()}


def tiles_of(x: Tensor | None, rows: int, arch: str) -> Any:
    """Tiles of `rows` rows of one head of a tensor [b, t, h, p], as load_tile takes them."""
    if x is None:
        return None
    if not takes_descriptors(x, arch):
        return x, x.stride()[:3], x.shape[1]
    return _descriptor(x, [1, rows, 1, x.shape[3]])


def _tiles_per_query(x: Tensor, rows: int, by_descriptor: bool) -> Any:
    """Tiles of one head's lse or delta, as load_per_query takes them."""
    return _descriptor(x, [1, 1, rows]) if by_descriptor else (x, x.stride()[:2], x.shape[2])


def takes_descriptors(x: Tensor, arch: str) -> bool:
    """Not for float32, whose products without tensor cores read each number from shared memory into many registers."""
    return arch not in WITHOUT_COPY_ENGINE and (x.dtype != torch.float32 or arch == INTERPRETER)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    # The stride of a dimension of size 1 means nothing, but it must be one that the copy engine takes.
    strides = [stride if size > 1 else ALIGNED_BYTES for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def is_tileable(x: Tensor) -> bool:
    """Whether a tensor lies in memory so that the copy engine can take tiles of it."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % ALIGNED_BYTES == 0 for stride in strides)
    return x.stride(-1) == 1 and aligned and x.data_ptr() % ALIGNED_BYTES == 0


def new_lse(q: Tensor) -> Tensor:
    """For one float32 per query and head, [b, h, t], with room at the end of each head so that it is tileable."""
    unit, num_queries = ALIGNED_BYTES // 4, q.shape[1]
    room = -(-num_queries // unit) * unit
    return q.new_empty(q.shape[0], q.shape[2], room, dtype=torch.float32)[..., :num_queries]


def lowest_place(inputs: FlatInputs, k: Tensor, age: int) -> int:
    """The first place whose key is read, of the window (age 0) or the fading memory (age W)."""
    return age - min(inputs.num_past, rows_before(inputs, k, age))


def _set_args(inputs: FlatInputs, config: Config, arch: str) -> dict[str, Any]:
    """Arguments of the kernels that go over the three sets."""
    index, k, fading_k, rows = inputs.index_bjm, inputs.k, inputs.fading_k, config.tiles["BLOCK_K"]
    eidetic_v = None if index is None else slot_values(inputs)
    return strided(q=inputs.q, eidetic_q=inputs.eidetic_q, eidetic_k=inputs.eidetic_k, eidetic_v=eidetic_v) | {
        "k_tiles": tiles_of(k, rows, arch),
        "v_tiles": tiles_of(inputs.v, rows, arch),
        "fading_k_tiles": tiles_of(fading_k, rows, arch),
        "fading_v_tiles": tiles_of(inputs.fading_v, rows, arch),
        "index_ptr": index,
        "docs_ptr": inputs.doc_ids_bt,
        "num_queries": inputs.num_queries,
        "window_size": inputs.window_size,
        "chunk_size": inputs.chunk_size,
        "num_chunks": 0 if index is None else index.shape[1],
        "lowest": lowest_place(inputs, k, 0),
        "fading_lowest": 0 if fading_k is None else lowest_place(inputs, fading_k, inputs.window_size),
        "rows_before": k.shape[1] - inputs.num_queries,
        "fading_rows_before": 0 if fading_k is None else fading_k.shape[1] - inputs.num_queries,
        "scale_log2": inputs.scale * LOG2_E,
    }


def _set_constants(inputs: FlatInputs, config: Config) -> dict[str, int]:
    return {
        "NUM_SLOTS": inputs.num_slots,
        "GROUP": inputs.group,
        "P": inputs.q.shape[3],
        "BLOCK_M": max(MIN_SIDE, min(MAX_SLOTS, config.tiles["BLOCK_K"])),
        **config.tiles,
    }


def _query_tiles(inputs: FlatInputs, q: Tensor, saved: Saved, config: Config, arch: str) -> dict[str, Any]:
    """Arguments of the kernels that go over the queries of a key tile."""
    rows, by_descriptor = config.tiles["BLOCK_Q"], takes_descriptors(q, arch)
    return {
        "q_tiles": tiles_of(q, rows, arch),
        "grad_out_tiles": tiles_of(saved.grad_out, rows, arch),
        "lse_tiles": _tiles_per_query(saved.lse, rows, by_descriptor),
        "delta_tiles": _tiles_per_query(saved.delta, rows, by_descriptor),
        "docs_ptr": inputs.doc_ids_bt,
        "num_queries": inputs.num_queries,
        "scale": inputs.scale,
        "scale_log2": inputs.scale * LOG2_E,
    }


def _by_time(lse: Tensor) -> tuple[int, int, int]:
    """Strides of batch, time and head of a tensor [b, h, t]."""
    batch, head, time = lse.stride()
    return batch, time, head


def _pair(first: Tensor | None, second: Tensor | None) -> Pair:
    """Both, which are there."""
    assert first is not None
    assert second is not None
    return first, second
