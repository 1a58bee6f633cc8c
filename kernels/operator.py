"""What an operator is: declared inputs, implementations ("paths") and tolerances; and the one place that dispatches.

A call runs on `triton` if its tensors are on a CUDA or ROCm device, on `static` if they are on a NeuronCore, on `cpp`
if they are on the CPU. If that path does not exist or refuses the inputs, it runs on `torch` (plain torch, everywhere).
The environment variable BMOJO_KERNELS or `use(...)` asks for another of PATHS; `reference` is the slow definition that
tests compare with. `nki` has kernels for a NeuronCore; where there is none, or it refuses, it is `static`.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.again import keep
from kernels.cpp import library
from kernels.shapes_only import counts_as_cpu, counts_as_gpu, is_shapes_only, stands_for_neuron

logger = logging.getLogger(__name__)
PATHS = ("reference", "torch", "cpp", "triton", "static", "nki")
NEURON = "neuron"  # torch's name for the type of device that a NeuronCore is
HAS_TRITON = importlib.util.find_spec("triton") is not None

P = ParamSpec("P")
In = TypeVar("In", bound=tuple[Any, ...])
Out = TypeVar("Out")

OPERATORS: dict[str, Operator[Any, Any, Any]] = {}  # by name; filled as operators are declared
_asked: str | None = os.environ.get("BMOJO_KERNELS")  # read once, because looking takes as long as a small operator


@dataclass(frozen=True)
class Path(Generic[In, Out]):
    """One implementation of an operator.

    run: outputs from inputs; differentiable if the operator is.
    refuses: the reason why it cannot take these inputs; None if it can.
    tolerance: largest error by dtype, relative to the largest value of the reference in float64.
    strict: if the path was asked for by name, a refusal is an error instead of a fall back to plain torch.
    """

    run: Callable[[In], Out]
    refuses: Callable[[In], str | None] = lambda inputs: None
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    strict: bool = False


class Choice(NamedTuple):
    """The path that an operator runs on, and why."""

    operator: str
    path: str
    reason: str


class Operator(Generic[P, In, Out]):
    """A function of tensors with several implementations, called as `operator(x, ...)`.

    Args:
        name: unique among OPERATORS.
        inputs: a NamedTuple: the signature, and in its docstring shapes, results, errors and source. Its first field
            decides on which device and in which dtype the operator runs.
        torch, cpp, static, reference: paths.  triton, nki: import and return a path; not called without a GPU, and only
            if asked for.
        check: raises ValueError for inputs that no path takes.
        example: inputs of a small call, for tests and for `planned`.
        autocast: "off" while it runs; "cast": off, and the first input is cast as torch's products would; or "follow".
    """

    def __init__(
        self,
        name: str,
        inputs: Callable[P, In],
        *,
        torch: Path[In, Out],
        example: Callable[[], In],
        reference: Path[In, Out] | None = None,
        cpp: Path[In, Out] | None = None,
        triton: Callable[[], Path[In, Out]] | None = None,
        static: Path[In, Out] | None = None,
        nki: Callable[[], Path[In, Out]] | None = None,
        check: Callable[[In], None] | None = None,
        autocast: Literal["off", "cast", "follow"] = "off",
    ) -> None:
        self.name, self.inputs, self.check, self.example = name, inputs, check, example
        self.autocast = autocast
        self.ran: dict[str, str] = {}  # path -> reason of the first call that took it
        self._torch, self._reference, self._cpp, self._triton = torch, reference, cpp, triton
        self._static, self._nki = static, nki
        self.__name__, self.__doc__, self.__signature__ = name, inputs.__doc__, inspect.signature(inputs)
        OPERATORS[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Out:
        inputs = self.inputs(*args, **kwargs)
        if self.check is not None:
            self.check(inputs)
        if self.autocast != "follow":
            x: Tensor = inputs[0]
            if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):  # a faster question first
                return self._without_autocast(inputs)
        path, name, reason = self._choose(inputs)
        if name not in self.ran and not torch.compiler.is_compiling() and not is_shapes_only():
            self.ran[name] = reason
            logger.info("%s runs on %s: %s", self.name, name, reason)
        return path.run(inputs)

    def _without_autocast(self, inputs: In) -> Out:
        x: Tensor = inputs[0]
        call: Callable[..., Out] = self
        if self.autocast == "cast":
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return call(x, *inputs[1:])

    def path(self, name: str) -> Path[In, Out] | None:
        """The implementation of that name, if there is one here."""
        if name == "cpp":
            return self._cpp
        if name == "triton":
            return self._triton() if HAS_TRITON and self._triton is not None else None
        if name == "static":
            return self._static
        if name == "nki":
            return None if self._nki is None else self._nki()
        return self._torch if name == "torch" else self._reference

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Choice:
        """The path that a call with these arguments takes, without running it.

        Raises: as `check_request`. ValueError: a strict path that was asked for refuses the inputs.
        """
        return Choice(self.name, *self._choose(self.inputs(*args, **kwargs))[1:])

    def _choose(self, inputs: In) -> tuple[Path[In, Out], str, str]:
        """The path, its name and the reason."""
        x: Tensor = inputs[0]
        asked = None if _asked is None else check_request(x)
        name = asked or ("triton" if counts_as_gpu(x) else "cpp" if counts_as_cpu(x) else _of_device(x))
        path = self.path(name)
        if path is None:
            reason = _ABSENT[name]
        else:
            refusal = (library.refuses(x) if name == "cpp" else None) or path.refuses(inputs)
            if refusal is None:
                return path, name, _ASKED if asked else _CHOSEN[name]
            if asked and path.strict:
                raise ValueError(refusal)
            reason = refusal
        if name == "nki" and self._static is not None:
            return self._static, "static", reason
        return self._torch, "torch", reason


def _of_device(x: Tensor) -> str:
    """The path of a tensor that is neither on the CPU nor on a GPU. Where there is none, `cpp` says why."""
    return "static" if x.device.type == NEURON or stands_for_neuron() else "cpp"


_ASKED = "asked for by BMOJO_KERNELS or use(...)"
_CHOSEN = {
    "cpp": "float32 or float64 on the CPU",
    "triton": "tensors are on a GPU",
    "static": "tensors are on a NeuronCore",
}
_ABSENT = {
    "cpp": "it has no C++ path",
    "triton": "it has no Triton path" if HAS_TRITON else "triton is not installed",
    "reference": "it has no reference",
    "static": "it has no static path",
    "nki": "it has no NKI kernel",
}


def ran() -> list[Choice]:
    """The paths that operators have taken in this process, and why. Not under torch.compile, which traces them."""
    return [Choice(name, *item) for name, operator in sorted(OPERATORS.items()) for item in operator.ran.items()]


def check_request(x: Tensor) -> str | None:
    """The path that BMOJO_KERNELS or `use` asks for, if any.

    Raises: ValueError: BMOJO_KERNELS names no path. RuntimeError: it asks for triton, which cannot run on x, or for
        cpp, which cannot be compiled (BuildError) or loaded (OSError).
    """
    asked = _asked
    if asked is None:
        return None
    if asked not in PATHS:
        raise ValueError(f"kernel path {asked!r} does not exist; set BMOJO_KERNELS to one of {', '.join(PATHS)}.")
    if asked == "cpp":
        library.load()
    if asked == "triton":
        _require_triton(x)
    return asked


@contextmanager
def use(path: str) -> Iterator[None]:
    """Force a path within a `with` block, for tests."""
    global _asked
    before, _asked = _asked, path
    try:
        yield
    finally:
        _asked = before


def _require_triton(x: Tensor) -> None:
    if not HAS_TRITON:
        raise RuntimeError("BMOJO_KERNELS=triton, but triton is not installed: pip install triton, or use torch.")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"BMOJO_KERNELS=triton, but the tensors are on {x.device.type!r}. Triton needs a CUDA or ROCm device; to "
            "try the kernels slowly on CPU set TRITON_INTERPRET=1 before Python starts, or use BMOJO_KERNELS=torch."
        )


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal tensors, the same every time: what examples are made of."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


Kept = tuple[Out, tuple[Any, ...], tuple[Any, ...]]  # outputs, and what a backward needs: as in Saved


class Saved(NamedTuple):
    """What a forward has kept for its backward."""

    tensors: tuple[Any, ...]  # tensors and None
    facts: tuple[Any, ...]  # anything else


def differentiable(
    forward: Callable[..., Kept[Any]],
    backward: Callable[..., Any],
    materialize_grads: bool = True,
) -> Callable[..., Any]:
    """The function of `forward`, with its gradient by hand. If no gradient is wanted, autograd is left out.

    Args:
        forward: takes the inputs, and `save`: whether a backward may follow. Returns outputs, and what to keep: tensors
            (or None), and other facts.
        backward: takes what was kept, and a gradient per output. Returns one per input.
        materialize_grads: whether the gradient of an unused output is zeros instead of None.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs, tensors, ctx.facts = forward(*inputs, save=True)
            saved, ctx.restore = keep(tensors)
            ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(materialize_grads)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(Saved(tuple(ctx.restore(ctx.saved_tensors)), ctx.facts), *grads)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Function.apply(*inputs)
        return forward(*inputs, save=False)[0]

    return call


_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
}


def library_op(
    name: str,
    inputs: Callable[..., In],
    forward: Callable[[In], Any],
    outputs: Callable[[In], Any],
    *,
    num_outputs: int = 1,
    gradients: Sequence[str] = (),
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    num_differentiable: int | None = None,
    keeps_outputs: bool = False,
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register a kernel as `bmojo::name` (and `bmojo::name_backward`), one node each to torch.compile.

    Args:
        inputs: a NamedTuple whose tensors come before its numbers.
        outputs: makes empty outputs: all that torch.compile has to know of them.
        gradients: names of the inputs that have a gradient.
        backward: takes inputs, outputs (if `keeps_outputs`) and a gradient per differentiable output. Returns a
            gradient per name in `gradients`; those of inputs that are None are dropped.
        num_differentiable: outputs after these have no gradient; None: all have.
        mutates: names of the inputs that are updated in place.
    Returns: a function of the inputs, which `torch.library.opcheck` takes too.
    """
    hints = typing.get_type_hints(inputs)
    num_tensors = sum(_SCHEMA[kind].startswith("Tensor") for kind in hints.values())
    num_grads = num_outputs if num_differentiable is None else num_differentiable
    num_kept = num_outputs if keeps_outputs else 0
    kinds = {
        field: _SCHEMA[kind].replace("Tensor", f"Tensor(m{index}!)") if field in mutates else _SCHEMA[kind]
        for index, (field, kind) in enumerate(hints.items())
    }
    declared = [f"{kind} {field}" for field, kind in kinds.items()]
    returned = ", ".join(["Tensor"] * num_outputs)

    def run(*given: Any) -> Any:
        return forward(inputs(*given))

    operator = torch.library.custom_op(
        f"bmojo::{name}",
        run,
        mutates_args=mutates,
        schema=f"({', '.join(declared)}) -> {returned if num_outputs == 1 else f'({returned})'}",
    )
    operator.register_fake(lambda *given: outputs(inputs(*given)))
    if backward is None:
        return operator

    def run_backward(*given: Any) -> list[Tensor]:
        grads = backward(inputs(*given[: len(hints)]), *given[len(hints) :])
        return [grad for grad in grads if grad is not None]

    def empty_gradients(*given: Any) -> list[Tensor]:
        return [
            x.new_empty(x.shape) for field, x in zip(hints, given, strict=False) if field in gradients and x is not None
        ]

    arguments = [
        *declared,
        *(f"Tensor output_{i}" for i in range(num_kept)),
        *(f"Tensor? grad_{i}" for i in range(num_grads)),
    ]
    backward_operator = torch.library.custom_op(
        f"bmojo::{name}_backward", run_backward, mutates_args=(), schema=f"({', '.join(arguments)}) -> Tensor[]"
    )
    backward_operator.register_fake(empty_gradients)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        made = (output,) if num_outputs == 1 else output
        ctx.mark_non_differentiable(*made[num_grads:])
        saved, ctx.restore = keep((*inputs[:num_tensors], *made[:num_kept]))
        ctx.save_for_backward(*saved)
        ctx.numbers = inputs[num_tensors:]

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.restore(ctx.saved_tensors)
        given = (*saved[:num_tensors], *ctx.numbers)
        found = iter(backward_operator(*given, *saved[num_tensors:], *grads[:num_grads]))
        return tuple(
            next(found) if field in gradients and x is not None else None for field, x in zip(hints, given, strict=True)
        )

    operator.register_autograd(differentiate, setup_context=save)
    return operator
