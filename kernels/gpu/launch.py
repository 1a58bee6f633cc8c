"""One call of a Triton kernel as a value: run on a GPU or in Triton's interpreter, or compiled for some other target.

Operators plan their launches from shapes alone, so the same plan that runs is the one that `kernel-report` compiles, on
a machine without a GPU, with the argument types and alignments of the real call.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import compiler
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.shapes_only import is_shapes_only


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments.

    kernel: what `triton.jit` returned.  grid: programs along x, y, z.
    args: tensors (meta tensors if it is only compiled), descriptors of them, integers, floats and None, by parameter
        name.
    constants: `tl.constexpr` parameters, by name.  max_registers: per thread, if limited.
    flops, bytes: what the call computes in matrix products, and must move to and from memory, by formula.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    flops: int = 0
    bytes: int = 0

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.__name__)

    def run(self) -> None:
        """Launch on the current stream of the tensors' device, which need not be the current device."""
        if is_shapes_only():
            return
        given = (x.base if isinstance(x, TensorDescriptor) else x for x in self.args.values())
        device = next(x.device for x in given if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.args, **self.constants, **self._options)

    def compile(self, target: Any) -> Any:
        """Compile for a `GPUTarget` without a device, specialised on alignment just as the real call would be."""
        backend = compiler.make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        options = self._options
        bound, specialization, _ = bind(**self.args, **self.constants, **options)
        parsed, signature, constexprs, attrs = self.kernel._pack_args(backend, options, bound, specialization, options)
        source = compiler.ASTSource(self.kernel, signature, constexprs, attrs)
        return compiler.compile(source, target=target, options=parsed.__dict__)

    @property
    def _options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


def num_bytes(*tensors: Tensor | None) -> int:
    """What moving the tensors once moves."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
