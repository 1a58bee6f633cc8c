"""Inputs and results of memory_write."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.memory_write import Rings, memory_write, reference
from kernels.memory_write.reference import WriteInputs
from kernels.operator import use
from tests.kernels.helpers import normal

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # see README.md
SIZES = [(4, 2, 8), (2, 2, 6), (1, 3, 2), (6, 1, 16)]  # heads, key/value heads, head_dim
SETS = ["window", "fading", "all"]


def table(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    angle = normal(*shape, seed=seed) * 3
    return angle.cos(), angle.sin()


def write_inputs(
    heads: int, kv_heads: int, head_dim: int, sets: str, dtype: torch.dtype = torch.float32
) -> WriteInputs:
    """sets: the rings that there are: "window", "fading" with it, or "all"."""

    def ring(size: int, seed: int) -> Tensor:
        return normal(3, kv_heads, size, head_dim, dtype=dtype, seed=seed).transpose(1, 2)  # as decoding lays them out

    q = normal(3, heads, head_dim, dtype=dtype)
    k, v, fading_k, fading_v = (normal(3, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in range(1, 5))
    rings = Rings(ring(5, 5), ring(5, 6))
    if sets != "window":
        rings = rings._replace(fading_k=ring(7, 8), fading_v=ring(7, 9))
    if sets == "all":
        rings = rings._replace(plain_k=ring(5, 7))
    far = table(head_dim // 2, seed=11) if sets == "all" else None
    fading = None if sets == "window" else (fading_k, fading_v)
    return WriteInputs(q, k, v, torch.tensor([0, 13, 4]), table(3, head_dim // 2, seed=10), far, rings, fading)


def results(path: str, inputs: WriteInputs) -> list[Tensor]:
    """What memory_write returns, and the rings afterwards; the inputs are left as they were."""
    rings = Rings(*(None if ring is None else ring.clone() for ring in inputs.rings))
    given = inputs._replace(rings=rings)
    with use(path):
        out = reference.memory_write.run(given) if path == "reference" else memory_write(*given)
    return [out, *(ring for ring in rings if ring is not None)]


def assert_defined(path: str, inputs: WriteInputs) -> None:
    """A path does what the reference does."""
    for got, want in zip(results(path, inputs), results("reference", inputs), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype == inputs.q_bhp.dtype
        assert (got.double() - want.double()).abs().max() <= TOLERANCE[got.dtype] * want.double().abs().max()


def assert_changes_only_its_slots(path: str) -> None:
    """Everything else in the rings stays as it was."""
    inputs = write_inputs(2, 2, 4, "all")
    _, *rings = results(path, inputs)
    before = [ring for ring in inputs.rings if ring is not None]
    for ring, old in zip(rings, before, strict=True):
        slots = inputs.position_b % ring.shape[1]
        changed = (ring != old).flatten(2).any(2)
        assert changed.nonzero().tolist() == [[row, slot] for row, slot in enumerate(slots.tolist())]


def in_other_layouts(inputs: WriteInputs) -> WriteInputs:
    """The same, with keys and values side by side, transposed queries, and rings with slots ahead of heads."""
    k, v = torch.cat([inputs.k_bhp, inputs.v_bhp], 1).chunk(2, 1)
    rings = Rings(*(None if ring is None else ring.contiguous() for ring in inputs.rings))
    q = inputs.q_bhp.transpose(0, 2).contiguous().transpose(0, 2)
    return inputs._replace(q_bhp=q, k_bhp=k, v_bhp=v, rings=rings)
