"""The operators at one size, each by our path and by other libraries that compute the same or come near."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from kernels.innovation_select import innovation_select
from kernels.memory_attention import Eidetic, KeysValues, memory_attention
from kernels.ssd_scan import ssd_scan


@dataclass(frozen=True)
class Sizes:
    batch: int
    t: int
    channels: int  # of the convolution
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    chunk: int
    slots: int
    ssm_heads: int
    ssm_head_dim: int
    d_state: int


# As in the operators' report cases; see `make kernel-report`.
REPORT = tuple(Sizes(8, 4096, 4096, 16, 4, n, 512, 256, 128, 32, 64, n) for n in (64, 128))
GATE = Sizes(2, 300, 256, 8, 2, 64, 96, 64, 32, 4, 64, 64)  # no multiple of a tile
TINY = Sizes(1, 21, 8, 2, 1, 16, 8, 4, 3, 2, 16, 16)  # for Triton's interpreter


@dataclass(frozen=True)
class Implementation:
    """A way to compute a case: a call of leaves, which take gradients.

    exact: it computes what ours does, so that its output can be compared.  note: what is different otherwise.
    """

    name: str
    leaves: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    exact: bool = True
    note: str = ""


@dataclass(frozen=True)
class Case:
    operator: str
    name: str
    ours: Implementation
    peers: tuple[Implementation, ...]
    has_backward: bool = True


def cases(sizes: Sizes, device: str, dtype: torch.dtype, *, compiled: bool) -> Iterator[Case]:
    """compiled: peers through torch.compile, as they are meant to be used on a GPU."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_()

    yield conv_case(sizes, normal)
    yield scan_case(sizes, normal)
    yield from attention_cases(sizes, normal, compiled)
    yield select_case(sizes, normal)


Normal = Callable[..., Tensor]


def conv_case(sizes: Sizes, normal: Normal) -> Case:
    x_btd, weight_dk = normal(sizes.batch, sizes.t, sizes.channels), normal(sizes.channels, 4)
    ours = Implementation("ours", (x_btd, weight_dk), lambda x, weight: causal_conv1d(x, weight)[0])
    peers = (Implementation("fla causal_conv1d", (x_btd, weight_dk), fla_conv),) if has_fla(x_btd) else ()
    return Case("causal_conv1d", f"{sizes.channels} channels, width 4", ours, peers)


def scan_case(sizes: Sizes, normal: Normal) -> Case:
    b, t, h, n = sizes.batch, sizes.t, sizes.ssm_heads, sizes.d_state
    x, B, C = normal(b, t, h, sizes.ssm_head_dim), normal(b, t, 1, n, scale=n**-0.5), normal(b, t, 1, n)
    dt = F.softplus(normal(b, t, h).detach().float() - 3).requires_grad_()
    A = -torch.linspace(1, 16, h, device=x.device)
    leaves = (x, dt, B, C)
    ours = Implementation("ours", leaves, lambda x, dt, B, C: ssd_scan(x, dt, A, B, C, torch.zeros_like(A))[0])
    peers = (fla_scan(x, dt, A, B, C),) if has_fla(x) else ()
    return Case("ssd_scan", f"{h} heads of {sizes.ssm_head_dim}, d_state {n}", ours, peers)


def attention_cases(sizes: Sizes, normal: Normal, compiled: bool) -> Iterator[Case]:
    b, t, w, c = sizes.batch, sizes.t, sizes.window, sizes.chunk
    q, far_q = (normal(b, t, sizes.heads, sizes.head_dim) for _ in range(2))
    k, v, far_k = (normal(b, t, sizes.kv_heads, sizes.head_dim) for _ in range(3))
    fading_k, fading_v = (normal(b, t - w, sizes.kv_heads, sizes.head_dim) for _ in range(2))
    index_bjm = random_slots(sizes, q.device)

    def without_slots(q: Tensor, k: Tensor, v: Tensor, fading_k: Tensor, fading_v: Tensor) -> Tensor:
        return memory_attention(q, k, v, KeysValues(fading_k, fading_v), window_size=w)

    def whole(*leaves: Tensor) -> Tensor:
        q, k, v, fading_k, fading_v, far_q, far_k = leaves
        fading, eidetic = KeysValues(fading_k, fading_v), Eidetic(far_q, far_k, v, index_bjm)
        return memory_attention(q, k, v, fading, eidetic, window_size=w, chunk_size=c)

    size = f"{sizes.heads} heads of {sizes.head_dim}, W {w}"
    leaves = (q, k, v, fading_k, fading_v)
    flex, sdpa = flex_attention(*leaves, w, compiled), causal_sdpa(q, k, v)
    yield Case(
        "memory_attention", f"window + fading, {size}", Implementation("ours", leaves, without_slots), (flex, sdpa)
    )
    name, leaves = f"window + fading + {sizes.slots} slots, {size}", (*leaves, far_q, far_k)
    yield Case(
        "memory_attention", name, Implementation("ours", leaves, whole), (inexact(flex, "without the slots"), sdpa)
    )


def select_case(sizes: Sizes, normal: Normal) -> Case:
    scores_bs = normal(sizes.batch, sizes.t).detach().float()
    position_bs = torch.arange(sizes.t, device=scores_bs.device).expand(sizes.batch, -1)

    def select(scores_bs: Tensor) -> Tensor:
        return innovation_select(
            scores_bs, position_bs, num_queries=sizes.t, chunk_size=sizes.chunk, window_size=sizes.window,
            num_eidetic=sizes.slots,
        )  # fmt: skip

    ours = Implementation("ours", (scores_bs,), select)
    return Case(
        "innovation_select", f"M {sizes.slots}, C {sizes.chunk}, W {sizes.window}", ours, (), has_backward=False
    )


def fla_conv(x_btd: Tensor, weight_dk: Tensor) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d as fla_causal_conv1d

    y_btd: Tensor = fla_causal_conv1d(x_btd, weight_dk, activation="silu")[0]
    return y_btd


def fla_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Implementation:
    """simple_gla: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t; heads have keys of their own, and dt is in v."""
    h = x.shape[2]
    per_head = [m.detach().expand(-1, -1, h, -1).contiguous() for m in (C, B)]
    values = (x * dt[..., None]).to(x.dtype).detach()
    leaves = tuple(m.requires_grad_() for m in (*per_head, values, (dt * A).detach()))
    return Implementation("fla chunk_simple_gla", leaves, simple_gla)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    o: Tensor = chunk_simple_gla(q, k, v, g, scale=1.0)[0]
    return o


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, fading_k: Tensor, fading_v: Tensor, window: int, compiled: bool
) -> Implementation:
    """Window and fading keys one after the other, and a mask that tells them apart; all under one softmax."""
    from torch.nn.attention import flex_attention as flex

    t = q.shape[1]

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - torch.where(key < t, key, key - t)
        return torch.where(
            key < t, (distance >= 0) & (distance < window), (distance >= window) & (distance < 2 * window)
        )

    blocks = flex.create_block_mask(mask, None, None, t, t + fading_k.shape[1], device=q.device)
    attend = torch.compile(flex.flex_attention) if compiled else flex.flex_attention

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [m.transpose(1, 2) for m in (q, k, v)]
        out: Tensor = attend(*heads_first, block_mask=blocks, enable_gqa=True)
        return out.transpose(1, 2)

    joined = [torch.cat(pair, 1).detach().requires_grad_() for pair in ((k, fading_k), (v, fading_v))]
    return Implementation("flex_attention", (q, *joined), call)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Implementation:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [m.transpose(1, 2) for m in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    return Implementation("SDPA", (q, k, v), call, exact=False, note="reads all that came before")


def inexact(implementation: Implementation, note: str) -> Implementation:
    return Implementation(implementation.name, implementation.leaves, implementation.call, exact=False, note=note)


def random_slots(sizes: Sizes, device: torch.device) -> Tensor:
    """For each chunk, rows that have left its window, as many as there are."""
    index = torch.full((sizes.batch, -(-sizes.t // sizes.chunk), sizes.slots), -1)
    for chunk in range(index.shape[1]):
        past = max(0, chunk * sizes.chunk - sizes.window + 1)
        kept = min(past, sizes.slots)
        index[:, chunk, :kept] = torch.rand(sizes.batch, past).argsort(1)[:, :kept]
    return index.to(device)


def has_fla(x: Tensor) -> bool:
    """Whether flash-linear-attention's kernels can be called on x."""
    return x.is_cuda and importlib.util.find_spec("fla") is not None
