"""Helpers that the tests of several operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from kernels.operator import use

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest value; see each README.md
DTYPES = list(TOLERANCE)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, drawn in float64 so that every dtype gets the same ones."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def documents(batch: int, t: int, share: float = 0.1) -> Tensor:
    """Document numbers [batch, t]; `share` of the positions start a document."""
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < share
    return starts.cumsum(1)


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows of the product of `axes` in which every pair of values of two axes occurs.

    For axes that only repeat each other's checks: a fault that takes three particular values at once is not covered.
    """
    rows = list(product(*(range(len(axis)) for axis in axes)))
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(missing.intersection(_pairs(row))))
        chosen.append(row)
        missing.difference_update(_pairs(row))
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]


def _pairs(row: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    return combinations(enumerate(row), 2)


def run(
    path: str, op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Mapping[str, Tensor | None],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Outputs of `op` on a path, "out0" and on, and "d..." the gradient of each floating-point input.

    dtype: what inputs are converted to. Cotangents are random, and the same in every dtype that holds them.
    """
    leaves = {name: _leaf(x, dtype) for name, x in inputs.items()}
    with use(path):
        out = op(*leaves.values())
    outputs = out if isinstance(out, tuple) else (out,)
    differentiable = [x for x in outputs if x.requires_grad]
    rounded = next(x.dtype for x in inputs.values() if x is not None)
    cotangents = [normal(*x.shape, dtype=rounded, seed=90 + i).to(x.dtype) for i, x in enumerate(differentiable)]
    wanted = {f"d{name}": x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(differentiable, list(wanted.values()), cotangents, allow_unused=True)
    named = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return {**named, **dict(zip(wanted, grads, strict=True))}


def _leaf(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The input with its strides, ready for a gradient if it is floating-point."""
    if x is None or not x.is_floating_point():
        return x
    return x.detach().to(dtype or x.dtype).requires_grad_()


def assert_close(
    got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None], tolerance: Mapping[torch.dtype, float]
) -> None:
    """Compare results; tolerance: by dtype of the value, relative to the largest one. No gradient stands for zeros."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        expected = want[name]
        if value is None or expected is None:
            assert value is None or not value.any(), name
            assert expected is None or not expected.any(), name
            continue
        assert value.shape == expected.shape, name
        if not value.numel():
            continue
        error = (value.double() - expected.double()).abs().max()
        assert error <= tolerance[value.dtype] * max(1.0, expected.abs().max().item()), name


def assert_same_bits(
    got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None], names: Iterable[str] | None = None
) -> None:
    for name in names or got:
        value, expected = got[name], want[name]
        assert value is expected or (value is not None and expected is not None and torch.equal(value, expected)), name


def strided(x: Tensor | None, layout: str) -> Tensor | None:
    """The same numbers as part of wider rows, as every other element, or with the axes in reverse order."""
    if x is None:
        return None
    if layout == "parts":
        return torch.cat([x, x, x], -1).split(x.shape[-1], -1)[1]
    if layout == "every other":
        return torch.stack([x, x + 1], -1)[..., 0]
    backwards = tuple(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)
