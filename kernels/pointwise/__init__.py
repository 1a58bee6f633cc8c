"""Small operators of every block, element by element or row by row: bound by memory, so each is one pass over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.operator import Operator, Path, random_tensors
from kernels.pointwise import cpp_path, reference, static_path, torch_path
from kernels.pointwise.reference import (
    AddNormInputs,
    BranchInputs,
    GatedInputs,
    GatedNormInputs,
    GateUpInputs,
    NormInputs,
    RotateBothInputs,
    RotateInputs,
    RotateKeysInputs,
    RowInputs,
    SplitInputs,
    TableInputs,
)

__all__ = [
    "add_rms_norm",
    "branch",
    "cross_entropy_",
    "gated",
    "gated_product",
    "gated_rms_norm",
    "rms_norm",
    "rotary_table",
    "rotate",
    "rotate_both",
    "rotate_keys",
    "split",
]


def _triton(name: str) -> Callable[[], Path[Any, Any]]:
    """Imports Triton if there is a GPU."""

    def path() -> Path[Any, Any]:
        from kernels.pointwise import triton_path

        found: Path[Any, Any] = getattr(triton_path, name)
        return found

    return path


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    x, other, weight = random_tensors((2, 5, 8), (2, 5, 8), (8,))
    return x, other, weight


def _heads() -> tuple[Tensor, Tensor, Tensor]:
    x, angle = random_tensors((2, 5, 4, 8), (5, 4))
    return x, angle.cos(), angle.sin()


rms_norm = Operator(
    "rms_norm",
    NormInputs,
    reference=reference.rms_norm,
    torch=torch_path.rms_norm,
    static=static_path.rms_norm,
    cpp=cpp_path.rms_norm,
    triton=_triton("rms_norm"),
    example=lambda: NormInputs(*_rows()[::2], 1e-5),
)
add_rms_norm = Operator(
    "add_rms_norm",
    AddNormInputs,
    reference=reference.add_rms_norm,
    torch=torch_path.add_rms_norm,
    static=static_path.add_rms_norm,
    cpp=cpp_path.add_rms_norm,
    triton=_triton("add_rms_norm"),
    example=lambda: AddNormInputs(*_rows(), 1e-5),
)
gated = Operator(
    "gated",
    GatedInputs,
    reference=reference.gated,
    torch=torch_path.gated,
    static=static_path.gated,
    cpp=cpp_path.gated,
    triton=_triton("gated"),
    example=lambda: GatedInputs(*_rows()[:2]),
)
gated_rms_norm = Operator(
    "gated_rms_norm",
    GatedNormInputs,
    reference=reference.gated_rms_norm,
    torch=torch_path.gated_rms_norm,
    static=static_path.gated_rms_norm,
    cpp=cpp_path.gated_rms_norm,
    triton=_triton("gated_rms_norm"),
    example=lambda: GatedNormInputs(*_rows(), 1e-5),
)
gated_product = Operator(
    "gated_product",
    GateUpInputs,
    reference=reference.gated_product,
    torch=torch_path.gated_product,
    static=static_path.gated_product,
    cpp=cpp_path.gated_product,
    triton=_triton("gated_product"),
    example=lambda: GateUpInputs(_rows()[0]),
)
rotary_table = Operator(
    "rotary_table",
    TableInputs,
    reference=reference.rotary_table,
    torch=torch_path.rotary_table,
    static=static_path.rotary_table,
    triton=_triton("rotary_table"),
    example=lambda: TableInputs(torch.tensor([[0, 3], [512, 1_000_003]]), 12, 10000.0, torch.float32),
    autocast="follow",
)
rotate = Operator(
    "rotate",
    RotateInputs,
    reference=reference.rotate,
    torch=torch_path.rotate,
    static=static_path.rotate,
    cpp=cpp_path.rotate,
    triton=_triton("rotate"),
    example=lambda: RotateInputs(*_heads()),
)
rotate_both = Operator(
    "rotate_both",
    RotateBothInputs,
    reference=reference.rotate_both,
    torch=torch_path.rotate_both,
    static=static_path.rotate_both,
    cpp=cpp_path.rotate_both,
    triton=_triton("rotate_both"),
    example=lambda: RotateBothInputs(_heads()[0], _heads()[1:], _heads()[:0:-1]),
)
rotate_keys = Operator(
    "rotate_keys",
    RotateKeysInputs,
    reference=reference.rotate_keys,
    torch=torch_path.rotate_keys,
    static=static_path.rotate_keys,
    cpp=cpp_path.rotate_keys,
    triton=_triton("rotate_keys"),
    example=lambda: RotateKeysInputs(*_heads()),
)
branch = Operator(
    "branch",
    BranchInputs,
    torch=torch_path.branch,
    static=static_path.branch,
    cpp=cpp_path.branch,
    triton=_triton("branch"),
    example=lambda: BranchInputs(_rows()[0].requires_grad_(), (5, 3, 0)),
)
split = Operator(
    "split",
    SplitInputs,
    torch=torch_path.split,
    static=static_path.split,
    cpp=cpp_path.split,
    triton=_triton("split"),
    example=lambda: SplitInputs(_rows()[0].requires_grad_(), (4, 3, 1)),
)
cross_entropy_ = Operator(
    "cross_entropy_",
    RowInputs,
    reference=reference.cross_entropy_,
    torch=torch_path.cross_entropy_,
    cpp=cpp_path.cross_entropy_,
    triton=_triton("cross_entropy_"),
    example=lambda: RowInputs(random_tensors((5, 11))[0], torch.arange(5), 0.1),
)
