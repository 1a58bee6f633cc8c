"""Runs kernels written in Gluon on a CPU, which Triton's interpreter does not.

A partition of warps is a thread, a tensor a torch tensor, shared memory a tensor too; layouts mean nothing. What is
asynchronous is as late as it may be: memory that a copy was begun into holds NaN until somebody has waited for it, and
a product reads its operands both when it is begun and when it is waited for, and must find the same.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PATIENCE_S = 60.0  # after which teams that wait for each other are a failure
GLUON = "triton.experimental.gluon"


class Pointer:
    """Addresses of elements of a tensor's memory."""

    def __init__(self, base: Tensor, offset: Tensor | int = 0) -> None:
        self.base, self.offset = base, torch.as_tensor(offset)
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    @property
    def memory(self) -> Tensor:
        """From the tensor's first element on, gaps between rows included."""
        elements = self.base.untyped_storage().nbytes() // self.base.element_size() - self.base.storage_offset()
        return self.base.as_strided((elements,), (1,), self.base.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.base, self.offset[index])

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        offset, read = torch.broadcast_tensors(self.offset, torch.as_tensor(True if mask is None else mask))
        return torch.where(
            read, self.memory[torch.where(read, offset, 0)], torch.as_tensor(other, dtype=self.base.dtype)
        )

    def store(self, value: Tensor, mask: Any = None) -> None:
        assert value.dtype == self.base.dtype
        offset, value, written = torch.broadcast_tensors(
            self.offset, value, torch.as_tensor(True if mask is None else mask)
        )
        self.memory[offset[written]] = value[written]


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.dtype, self.shape = memory, memory.dtype, list(memory.shape)

    def index(self, index: Any) -> Shared:
        return Shared(self.memory[int(index)])

    def reshape(self, shape: Any) -> Shared:
        return Shared(self.memory.view(shape))

    def permute(self, order: Any) -> Shared:
        return Shared(self.memory.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: Any, layout: Any) -> Shared:
        return Shared(self.memory.view(dtype).view(shape))

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.memory.copy_(value)


class Product:
    """a b + acc, on its way."""

    def __init__(self, a: Tensor | Shared, b: Shared, acc: Tensor) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.begun = self.now()

    def now(self) -> Tensor:
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        return self.acc + a.float() @ self.b.memory.float()

    def finished(self) -> Tensor:
        assert torch.equal(self.begun, self.now()), "an operand changed, or was not there, while a product read it"
        return self.begun


class Barrier:
    """An mbarrier."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = self.bytes = 0
        self.copies: list[Callable[[], None]] = []

    def settle(self) -> None:
        """The next phase, if all have arrived and all was copied."""
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Machine:
    """One program at a time: its place in the grid, its barriers, what each thread has begun to copy."""

    def __init__(self) -> None:
        self.place, self.grid = (0, 0, 0), (1, 1, 1)
        self.barriers: dict[int, Barrier] = {}
        self.changed = threading.Condition()
        self.local = threading.local()
        self.failed = False

    def barrier(self, shared: Shared) -> Barrier:
        return self.barriers[shared.memory.data_ptr()]

    def init(self, shared: Shared, count: int) -> None:
        self.barriers[shared.memory.data_ptr()] = Barrier(count)

    def expect(self, shared: Shared, bytes: int) -> None:
        with self.changed:
            barrier = self.barrier(shared)
            barrier.bytes += int(bytes)
            self._arrive(barrier, 1)

    def arrive(self, shared: Shared, count: int = 1) -> None:
        with self.changed:
            self._arrive(self.barrier(shared), count)

    def _arrive(self, barrier: Barrier, count: int) -> None:
        barrier.missing -= count
        assert barrier.missing >= 0, "more arrivals than a phase has"
        barrier.settle()
        self.changed.notify_all()

    def wait(self, shared: Shared, phase: Any) -> None:
        barrier = self.barrier(shared)

        def over() -> bool:
            while barrier.copies and barrier.phase % 2 == int(phase):
                barrier.copies.pop()()
            barrier.settle()
            return self.failed or barrier.phase % 2 != int(phase)

        with self.changed:
            if not self.changed.wait_for(over, PATIENCE_S):
                self.failed = True
            assert not self.failed, "teams wait for each other"
            self.changed.notify_all()

    def copy_tile(self, descriptor: Any, coordinate: Any, shared_barrier: Shared, result: Shared) -> None:
        result.memory.fill_(float("nan"))
        first = [int(c) for c in coordinate]
        barrier = self.barrier(shared_barrier)

        def copy() -> None:
            """Zeros outside the tensor."""
            axes = [
                torch.arange(start, start + size) for start, size in zip(first, descriptor.block_shape, strict=True)
            ]
            offset, inside = torch.tensor(0), torch.tensor(True)
            for axis, size, stride in zip(
                torch.meshgrid(*axes, indexing="ij"), descriptor.shape, descriptor.strides, strict=True
            ):
                offset, inside = offset + axis * stride, inside & (axis >= 0) & (axis < size)
            tile = Pointer(descriptor.base, offset).load(inside)
            result.memory.copy_(tile)
            barrier.bytes -= tile.numel() * tile.element_size()

        with self.changed:
            barrier.copies.append(copy)
            self.changed.notify_all()

    def begin_copy(self, shared: Shared, pointer: Pointer) -> None:
        shared.memory.fill_(float("nan"))
        self._begun().append(lambda: shared.memory.copy_(pointer.load()))

    def wait_group(self, num_outstanding: int) -> None:
        assert num_outstanding == 0
        for copy in self._begun():
            copy()
        self._begun().clear()

    def _begun(self) -> list[Callable[[], Any]]:
        if not hasattr(self.local, "begun"):
            self.local.begun = []
        begun: list[Callable[[], Any]] = self.local.begun
        return begun

    def warp_specialize(self, functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any) -> None:
        errors: list[BaseException] = []

        @torch.no_grad()  # a thread has a mode of its own
        def run(function: Callable[..., Any], args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:  # given to the caller below
                with self.changed:
                    errors.append(error)
                    self.failed = True
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=pair) for pair in functions_and_args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _reduce(function: Callable[..., Tensor], x: Tensor, axis: int) -> Tensor:
    return function(x, axis)


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _jit


def _modules(machine: Machine) -> dict[str, ModuleType]:
    """What kernels import."""

    def either(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
        return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

    def where(condition: Any, a: Any, b: Any) -> Tensor:
        return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))

    def cdiv(a: Any, b: int) -> Tensor:
        return torch.div(torch.as_tensor(a) + b - 1, b, rounding_mode="trunc")

    def wait_products(num_outstanding: int, deps: Any) -> Any:
        finished = tuple(x.finished() if isinstance(x, Product) else x for x in deps)
        return finished[0] if len(finished) == 1 else finished

    def product(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        return Product(a, b, acc if use_acc else torch.zeros_like(acc))

    language = SimpleNamespace(
        constexpr=lambda value: value,
        NVMMADistributedLayout=lambda **_: None, DotOperandLayout=lambda **_: None, SliceLayout=lambda *_: None,
        BlockedLayout=lambda *_: None, NVMMASharedLayout=lambda **_: None, SwizzledSharedLayout=lambda **_: None,
        float32=torch.float32, int32=torch.int32, int64=torch.int64,
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
        store=lambda pointer, value, mask=None: pointer.store(value, mask),
        convert_layout=lambda x, layout: x,
        max=functools.partial(_reduce, torch.amax), min=functools.partial(_reduce, torch.amin),
        sum=functools.partial(_reduce, torch.sum),
        maximum=either(torch.maximum), minimum=either(torch.minimum), where=where,
        exp2=torch.exp2, log2=torch.log2, cdiv=cdiv,
        static_range=range,
        program_id=lambda axis: torch.tensor(machine.place[axis]),
        num_programs=lambda axis: torch.tensor(machine.grid[axis]),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.zeros(shape, dtype=dtype)),
        warp_specialize=machine.warp_specialize,
    )  # fmt: skip
    hopper = SimpleNamespace(
        async_copy=SimpleNamespace(
            async_copy_global_to_shared=machine.begin_copy, commit_group=lambda: None, wait_group=machine.wait_group
        ),
        fence_async_shared=lambda: None,
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=machine.init,
            expect=machine.expect,
            arrive=machine.arrive,
            wait=machine.wait,
        ),
        tma=SimpleNamespace(async_copy_global_to_shared=machine.copy_tile),
        warpgroup_mma=product,
        warpgroup_mma_wait=wait_products,
    )
    gluon = SimpleNamespace(jit=_jit, language=language)
    return {
        "triton.experimental": SimpleNamespace(gluon=gluon),  # type: ignore[dict-item]  # stands for a module
        GLUON: gluon,  # type: ignore[dict-item]
        f"{GLUON}.language": language,  # type: ignore[dict-item]
        f"{GLUON}.language.nvidia.hopper": hopper,  # type: ignore[dict-item]
    }


class _NewValues(ast.NodeTransformer):
    """x += y as x = x + y: in a kernel that is a new value, and for a torch tensor it is not."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.copy_location(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)), node)


def _import(name: str) -> ModuleType:
    file = importlib.util.find_spec(name).origin  # type: ignore[union-attr]  # ours, so it is found
    assert file is not None
    tree = ast.fix_missing_locations(_NewValues().visit(ast.parse(Path(file).read_text(encoding="utf-8"))))
    sys.modules[name] = module = ModuleType(name)
    exec(compile(tree, file, "exec"), vars(module))
    return module


@contextmanager
def interpreted(*names: str) -> Iterator[Callable[[Any], None]]:
    """Within, the modules of these names are imported again, and the result runs their launches.

    A module is named after those that it imports.
    """
    machine = Machine()
    without = {name: module for name, module in sys.modules.items() if name not in names}
    with mock.patch.dict(sys.modules, without | _modules(machine), clear=True):
        functions = {key: value for name in names for key, value in vars(_import(name)).items()}

    def run(launch: Any) -> None:
        function = functions[launch.name]
        args = {name: Pointer(x) if isinstance(x, Tensor) else x for name, x in launch.args.items()}
        machine.grid = (*launch.grid, 1, 1)[:3]
        for z in range(machine.grid[2]):
            for y in range(machine.grid[1]):
                for x in range(machine.grid[0]):
                    machine.place = (x, y, z)
                    machine.barriers.clear()
                    function(**args, **launch.constants)

    yield run
