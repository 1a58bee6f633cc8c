"""The launches of memory attention, planned from shapes alone. Tiling: README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Launch, num_bytes
from kernels.memory_attention.triton_backward import (
    key_grad_kernel,
    query_grad_kernel,
    slot_grad_kernel,
    sum_slots_kernel,
)
from kernels.memory_attention.triton_forward import forward_kernel
from kernels.tuning import INTERPRETER, Config, choose

LOG2_E = math.log2(math.e)
MAX_COLUMNS = 1024  # of sum_slots_kernel's programs
Pair = tuple[Tensor, Tensor]  # of keys and values, or of their gradients


def _tiles(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, num_warps, num_stages)


# By kernel, architecture and bytes of a head's row: tiles, the first being the default, whose registers do not spill
# (`make kernel-report`). On sm_90 it is what an H200 was fastest with; wide key tiles for key_grad on sm_100 halve how
# often it reads a query.
CONFIGS: dict[str, dict[str, dict[int, tuple[Config, ...]]]] = {
    "forward": {
        "sm_80": {
            128: (_tiles(128, 64, 8, 2), _tiles(64, 64, 4, 2)),
            256: (_tiles(128, 32, 8, 2), _tiles(64, 32, 4, 3)),
        },
        "sm_90": {
            128: (_tiles(64, 64, 4, 3), _tiles(128, 64, 8, 3), _tiles(128, 128, 8, 2)),
            256: (_tiles(128, 64, 8, 3), _tiles(64, 64, 4, 2)),
        },
        "sm_100": {
            128: (_tiles(128, 64, 8, 3), _tiles(128, 128, 8, 2), _tiles(64, 64, 4, 3)),
            256: (_tiles(128, 64, 8, 3), _tiles(64, 64, 4, 2)),
        },
        "gfx942": {128: (_tiles(128, 64, 4, 1), _tiles(128, 32, 4, 1)), 256: (_tiles(128, 32, 4, 1),)},
        INTERPRETER: {128: (_tiles(16, 16, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
    },
    "query_grad": {
        "sm_80": {128: (_tiles(64, 32, 4, 2),), 256: (_tiles(64, 32, 4, 2),)},
        "sm_90": {
            128: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
            256: (_tiles(128, 64, 8, 2), _tiles(64, 64, 4, 2)),
        },
        "sm_100": {
            128: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
            256: (_tiles(128, 64, 8, 2), _tiles(64, 64, 4, 2)),
        },
        "gfx942": {128: (_tiles(64, 64, 4, 1), _tiles(64, 32, 4, 1)), 256: (_tiles(64, 32, 4, 1),)},
        INTERPRETER: {128: (_tiles(16, 16, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
    },
    "key_grad": {
        "sm_80": {128: (_tiles(32, 64, 4, 2),), 256: (_tiles(32, 64, 4, 2),)},
        "sm_90": {
            128: (_tiles(64, 64, 4, 2), _tiles(64, 128, 8, 2)),
            256: (_tiles(32, 64, 4, 2), _tiles(32, 128, 8, 2)),
        },
        "sm_100": {
            128: (_tiles(64, 128, 8, 2), _tiles(64, 64, 4, 2)),
            256: (_tiles(64, 128, 8, 2), _tiles(64, 64, 4, 2)),
        },
        "gfx942": {128: (_tiles(32, 64, 4, 1),), 256: (_tiles(32, 64, 4, 1),)},
        INTERPRETER: {128: (_tiles(16, 16, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
    },
}


@dataclass(frozen=True)
class Call:
    """The inputs of memory_attention, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    fading: tuple[Tensor, Tensor] | None
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None
    docs: Tensor | None
    window_size: int
    chunk_size: int
    num_past: int
    scale: float

    @property
    def num_queries(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def num_slots(self) -> int:
        return 0 if self.eidetic is None else self.eidetic[3].shape[2]

    @property
    def num_chunks(self) -> int:
        return -(-self.num_queries // self.chunk_size)

    @property
    def tensors(self) -> list[Tensor]:
        docs = () if self.docs is None else (self.docs,)
        return [self.q, self.k, self.v, *(self.fading or ()), *(self.eidetic or ()), *docs]

    @property
    def num_pairs(self) -> int:
        """Pairs of a query row and a key it reads, in all sets, were there one document."""
        pairs = self.band_pairs(0, self.k) + self.num_queries * self.num_slots
        if self.fading is not None:
            pairs += self.band_pairs(self.window_size, self.fading[0])
        return self.q.shape[0] * self.q.shape[2] * pairs

    def band_pairs(self, age: int, k: Tensor) -> int:
        """Pairs of one head in the window (age 0) or the fading memory (age W)."""
        past = min(self.num_past, self.rows_before(k, age)) - age
        return self._window_pairs(past + self.num_queries) - self._window_pairs(past)

    def _window_pairs(self, num_positions: int) -> int:
        """What the first positions of a sequence read."""
        growing = min(max(num_positions, 0), self.window_size)
        return growing * (growing + 1) // 2 + (max(num_positions, 0) - growing) * self.window_size

    def rows_before(self, k: Tensor, age: int) -> int:
        """Key rows of the window (age 0) or the fading memory (age W) that lie before the first query's position."""
        return k.shape[1] - self.num_queries + age

    def query_tiles(self, config: Config) -> int:
        """How many there are; none crosses a chunk boundary."""
        positions = config.tiles["BLOCK_Q"] // self.group
        last = self.num_queries - (self.num_chunks - 1) * self.chunk_size
        return (self.num_chunks - 1) * -(-self.chunk_size // positions) - (-last // positions)


@dataclass(frozen=True)
class Saved:
    """What the backward reads besides the inputs; delta, sum(grad_out * out), is written by query_grad_kernel."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    delta: Tensor


def row_bytes(q: Tensor) -> int:
    """What a head's row counts for in CONFIGS: float32 twice, its products being summed without tensor cores."""
    return q.shape[-1] * q.element_size() * (2 if q.dtype == torch.float32 else 1)


def candidates(kernel: str, arch: str, width: int) -> list[Config]:
    """CONFIGS for a head's row; rows wider than any there get tiles smaller in proportion."""
    widths = CONFIGS[kernel][arch]
    known = min((known for known in widths if known >= width), default=max(widths))
    shrink = max(1, width // known)
    return [
        Config(
            {name: max(16, size // shrink) for name, size in config.tiles.items()}, config.num_warps, config.num_stages
        )
        for config in widths[known]
    ]


def most_query_heads(width: int, arch: str) -> int:
    """Query heads a key/value head that every query tile can hold."""
    kernels = ("forward", "query_grad")
    return min(config.tiles["BLOCK_Q"] for kernel in kernels for config in candidates(kernel, arch, width))


def pick(kernel: str, arch: str, call: Call, plan: Callable[[Config], Sequence[Launch]]) -> Config:
    key = (call.q.dtype, call.head_dim, call.group, call.num_slots, call.fading is not None)
    found = candidates(kernel, arch, row_bytes(call.q))
    return choose(f"memory_attention.{kernel}", arch, found, key, plan)


def plan_forward(call: Call, out: Tensor, lse: Tensor, arch: str) -> list[Launch]:
    """Write out [b, t, h, p] and lse [b, t, h]."""

    def plan(config: Config) -> list[Launch]:
        return [
            Launch(
                forward_kernel,
                (call.query_tiles(config), call.k.shape[2], call.q.shape[0]),
                _set_args(call) | strided(out=out, lse=lse),
                {"NUM_SLOTS": call.num_slots, "GROUP": call.group, "P": call.head_dim, **config.tiles},
                config.num_warps,
                config.num_stages,
                flops=4 * call.head_dim * call.num_pairs,
                bytes=num_bytes(out, lse, *call.tensors),
            )
        ]

    return plan(pick("forward", arch, call, plan))


def plan_query_grad(call: Call, saved: Saved, grad_q: Tensor, grad_eidetic_q: Tensor | None, arch: str) -> list[Launch]:
    """Write saved.delta and the gradients of both kinds of queries, [b, t, h, p]."""
    written = {"delta_ptr": saved.delta, "grad_q_ptr": grad_q, "grad_eidetic_q_ptr": grad_eidetic_q}
    read = strided(out=saved.out, lse=saved.lse, grad_out=saved.grad_out) | {"scale": call.scale}

    def plan(config: Config) -> list[Launch]:
        return [
            Launch(
                query_grad_kernel,
                (call.query_tiles(config), call.k.shape[2], call.q.shape[0]),
                _set_args(call) | read | written,
                {"NUM_SLOTS": call.num_slots, "GROUP": call.group, "P": call.head_dim, **config.tiles},
                config.num_warps,
                config.num_stages,
                flops=6 * call.head_dim * call.num_pairs,
                bytes=num_bytes(*vars(saved).values(), grad_q, grad_eidetic_q, *call.tensors),
            )
        ]

    return plan(pick("query_grad", arch, call, plan))


def plan_key_grad(call: Call, saved: Saved, age: int, keys_values: Pair, grads: Pair, arch: str) -> list[Launch]:
    """Write the gradients of the window's keys and values (age 0) or the fading memory's (age W)."""
    k = keys_values[0]
    args = _key_args(call, saved, call.q, keys_values, grads) | {
        "num_past": call.num_past, "window_size": call.window_size, "age": age, "rows_before": call.rows_before(k, age),
    }  # fmt: skip

    def plan(config: Config) -> list[Launch]:
        return [
            Launch(
                key_grad_kernel,
                (-(-k.shape[1] // config.tiles["BLOCK_K"]), k.shape[2], k.shape[0]),
                args,
                {"GROUP": call.group, "P": call.head_dim, **config.tiles},
                config.num_warps,
                config.num_stages,
                flops=8 * call.head_dim * call.q.shape[0] * call.q.shape[2] * call.band_pairs(age, k),
                bytes=num_bytes(call.q, saved.grad_out, saved.lse, saved.delta, *keys_values, *grads),
            )
        ]

    return plan(pick("key_grad", arch, call, plan))


def plan_slot_grad(call: Call, saved: Saved, slot_grads: Pair, grads: Pair, arch: str) -> list[Launch]:
    """Write the gradients of the eidetic keys and values.

    slot_grads: float32 buffers [b, chunks x M, kv heads, p] for what each chunk gives to each of its slots.
    """
    assert call.eidetic is not None
    q, k, v, index = call.eidetic
    args = _key_args(call, saved, q, (k, v), slot_grads) | {
        "index_ptr": index, "chunk_size": call.chunk_size, "num_chunks": index.shape[1],
    }  # fmt: skip

    def plan(config: Config) -> list[Launch]:
        tiles = -(-call.num_slots // config.tiles["BLOCK_K"])
        return [
            Launch(
                slot_grad_kernel,
                (call.num_chunks * tiles, k.shape[2], k.shape[0]),
                args,
                {"NUM_SLOTS": call.num_slots, "GROUP": call.group, "P": call.head_dim, **config.tiles},
                config.num_warps,
                config.num_stages,
                flops=8 * call.head_dim * call.q.shape[0] * call.q.shape[2] * call.num_queries * call.num_slots,
                bytes=num_bytes(q, saved.grad_out, saved.lse, saved.delta, index, *slot_grads)
                + slot_grads[0].numel() * (k.element_size() + v.element_size()),
            )
        ]

    return plan(pick("key_grad", arch, call, plan)) + [_plan_sum(index[:, : call.num_chunks], slot_grads, grads)]


def _plan_sum(index_bjm: Tensor, slot_grads: Pair, grads: Pair) -> Launch:
    """Sum the entries of each row, in the order of the chunks."""
    batch, num_rows, kv_heads, head_dim = grads[0].shape
    entry_row = index_bjm.reshape(batch, -1)
    entry_row = torch.where(entry_row >= 0, entry_row, num_rows)
    sorted_row, order = torch.sort(entry_row, stable=True)
    row = torch.arange(num_rows + 1, device=entry_row.device, dtype=entry_row.dtype)
    begin = torch.searchsorted(sorted_row, row.expand(batch, -1).contiguous())
    width = kv_heads * head_dim
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())
    return Launch(
        sum_slots_kernel,
        (num_rows, -(-width // block), batch),
        {
            "slot_grad_k_ptr": slot_grads[0], "slot_grad_v_ptr": slot_grads[1], "order_ptr": order, "begin_ptr": begin,
            "grad_k_ptr": grads[0], "grad_v_ptr": grads[1],
            "num_rows": num_rows, "num_entries": entry_row.shape[1], "width": width,
        },
        {"BLOCK": block, "ENTRIES": 4},
        num_warps=max(1, min(8, block // 128)),
        bytes=num_bytes(*slot_grads, order, begin, *grads),
    )  # fmt: skip


def strided(**tensors: Tensor | None) -> dict[str, Any]:
    """Arguments x_ptr and x_strides, of batch, time and head, for tensors [b, t, h, ...]."""
    pointers: dict[str, Any] = {f"{name}_ptr": x for name, x in tensors.items()}
    return pointers | {f"{name}_strides": None if x is None else x.stride()[:3] for name, x in tensors.items()}


def _set_args(call: Call) -> dict[str, Any]:
    """Arguments of the kernels that go over the three sets."""
    fading_k, fading_v = call.fading or (None, None)
    eidetic_q, eidetic_k, eidetic_v, index = call.eidetic or (None, None, None, None)
    return strided(
        q=call.q, k=call.k, v=call.v, fading_k=fading_k, fading_v=fading_v,
        eidetic_q=eidetic_q, eidetic_k=eidetic_k, eidetic_v=eidetic_v,
    ) | {
        "index_ptr": index, "docs_ptr": call.docs, "num_queries": call.num_queries, "num_past": call.num_past,
        "window_size": call.window_size, "chunk_size": call.chunk_size,
        "num_chunks": 0 if index is None else index.shape[1], "rows_before": call.rows_before(call.k, 0),
        "fading_rows_before": 0 if fading_k is None else call.rows_before(fading_k, call.window_size),
        "scale_log2": call.scale * LOG2_E,
    }  # fmt: skip


def _key_args(call: Call, saved: Saved, q: Tensor, keys_values: Pair, grads: Pair) -> dict[str, Any]:
    """Arguments of the kernels that go over the queries of a key tile; both gradients are laid out alike."""
    k, v = keys_values
    return strided(q=q, k=k, v=v, lse=saved.lse, grad_out=saved.grad_out, grad_k=grads[0]) | {
        "docs_ptr": call.docs, "delta_ptr": saved.delta, "grad_v_ptr": grads[1], "num_queries": call.num_queries,
        "scale": call.scale, "scale_log2": call.scale * LOG2_E,
    }  # fmt: skip
