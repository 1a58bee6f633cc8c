"""The graphs that a compiler is given for a model's parts, forward and backward, and what is wrong with them.

torch.compile and AOTAutograd make the graphs, as on the device, from tensors without memory; then they are read instead
of compiled. Blocks of one mixer have one graph, so each mixer is looked at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo import BMojoLM, ModelConfig
from bmojo.compiled import compile_parts
from bmojo.model import Block, Compiled
from kernels.operator import use
from pipelines.neuron.checks.fake_step import put_on
from pipelines.neuron.checks.op_table import OpTable

Direction = Literal["forward", "backward"]
LOSS = "loss"


class Graph(NamedTuple):
    part: str  # name of a block's mixer, or LOSS
    direction: Direction
    module: fx.GraphModule

    @property
    def name(self) -> str:
        return f"{self.part} {self.direction}"

    @property
    def ops(self) -> Counter[str]:
        """How often each operator is called, by names such as aten.mm.default."""
        return Counter(str(node.target) for node in self.calls())

    @property
    def num_nodes(self) -> int:
        return sum(self.ops.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that a node makes."""
        return max((x.numel() * x.itemsize for node in self.calls() for x in tensors_of(node)), default=0)

    def calls(self) -> Iterator[fx.Node]:
        """Nodes that compute something."""
        for node in self.module.graph.nodes:
            if node.op == "call_function" and "getitem" not in str(node.target):
                yield node


class Values(NamedTuple):
    """What a graph was given, and what it gave."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class Recorder:
    """Compiles parts by keeping their graphs, which then run as they are.

    values: of each graph's last run, by name, if they are kept.
    """

    def __init__(self, keeps_values: bool = False) -> None:
        self.graphs: list[Graph] = []
        self.values: dict[str, Values] = {}
        self.keeps_values = keeps_values

    def compile(self, part: str, function: Callable[..., Any]) -> Compiled:
        """`function` as one static graph each way. Raises, when it is called: torch's error for a graph break."""
        backend = aot_autograd(fw_compiler=self._keep(part, "forward"), bw_compiler=self._keep(part, "backward"))
        compiled: Compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        return compiled

    def _keep(self, part: str, direction: Direction) -> Callable[..., Any]:
        def keep(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graph = Graph(part, direction, module)
            self.graphs.append(graph)

            def run(*given: Any) -> Any:
                outputs = module(*given)
                if self.keeps_values:
                    self.values[graph.name] = Values(given, tuple(outputs))
                return outputs

            boxed: Callable[..., Any] = make_boxed_func(run)
            return boxed

        return keep


def record_parts(model: BMojoLM, recorder: Recorder) -> None:
    """Compile the parts of a model with a recorder, named by mixer."""
    names = dict(zip(model.blocks, model.config.mixers, strict=True))

    def compile(function: Callable[..., Any]) -> Compiled:
        owner = getattr(function, "__self__", None)
        return recorder.compile(names[owner] if isinstance(owner, Block) else LOSS, function)

    compile_parts(model, compile)


def graphs_of(config: ModelConfig, seq_len: int, batch: int, *, documents: bool, bf16: bool = True) -> list[Graph]:
    """The graphs of a training step, on the static path, of one layer per mixer. No tensor has memory.

    Raises: torch._dynamo.exc.TorchDynamoException and others of torch: a part is not one graph.
    """
    with torch.device("meta"):
        model = BMojoLM(one_layer_per_mixer(config))
    recorder = Recorder()
    with FakeTensorMode(), fresh_compiler():
        put_on(model, torch.device("cpu"))
        record_parts(model, recorder)
        tokens_bt = torch.zeros(batch, seq_len, dtype=torch.int64)
        step(model, tokens_bt, documents, bf16)
    return recorder.graphs


def one_layer_per_mixer(config: ModelConfig) -> ModelConfig:
    """The same model with as few layers as have all its graphs; of layers with several numbers of slots the largest."""
    slots = config.num_eidetic if isinstance(config.num_eidetic, int) else max(config.num_eidetic)
    return config.replace(pattern=",".join(dict.fromkeys(config.mixers)), num_eidetic=slots)


def graphs_with_values(config: ModelConfig, seq_len: int, batch: int, *, documents: bool) -> Recorder:
    """As `graphs_of`, in float32 and with real numbers, which the recorder keeps."""
    model = BMojoLM(one_layer_per_mixer(config))
    recorder = Recorder(keeps_values=True)
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(model.embedding.num_embeddings, (batch, seq_len), generator=generator)
    with fresh_compiler():
        record_parts(model, recorder)
        step(model, tokens_bt, documents, bf16=False)
    return recorder


def step(model: BMojoLM, tokens_bt: Tensor, documents: bool, bf16: bool) -> None:
    """Forward and backward on the static path."""
    with use("static"):
        docs_bt = two_documents(tokens_bt) if documents else None
        wanted_bt = torch.ones_like(tokens_bt, dtype=torch.bool) if model.config.selection == "oracle" else None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(tokens_bt, tokens_bt, docs_bt, wanted_bt=wanted_bt).loss
        assert loss is not None
        loss.backward()


def two_documents(tokens_bt: Tensor) -> Tensor:
    """Of which the first is long enough that its tokens leave the window, and are read as memories."""
    t = tokens_bt.shape[1]
    return (torch.arange(t, device=tokens_bt.device) >= t * 3 // 4).to(torch.int64).expand_as(tokens_bt)


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what it compiled before, and without leaving anything."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def findings(graphs: Sequence[Graph], table: OpTable) -> list[str]:
    """What is wrong, one line each; none: all graphs are as the device's compiler needs them, as far as is known."""
    found = []
    for (part, direction), count in Counter((graph.part, graph.direction) for graph in graphs).items():
        if count > 1:
            found.append(f"{part} {direction}: compiled {count} times; a shape or something else changed between calls")
    for part in dict.fromkeys(graph.part for graph in graphs):
        missing = {"forward", "backward"} - {graph.direction for graph in graphs if graph.part == part}
        found += [f"{part}: no {direction} graph was seen" for direction in sorted(missing)]
    for graph in graphs:
        found += [f"{graph.name}: {reason}" for reason in _wrong_ops(graph, table)]
        found += [f"{graph.name}: {reason}" for reason in _wrong_tensors(graph, table)]
    return found


def _wrong_ops(graph: Graph, table: OpTable) -> Iterator[str]:
    for op, count in sorted(graph.ops.items()):
        verdict = table.verdict(op)
        if verdict is None:
            yield f"{op} ({count} times) is not in the op table; look at it, and add it to op_table.toml"
        elif verdict.tier == "deny":
            yield f"{op} ({count} times) is on the deny list: {verdict.reason}"


def _wrong_tensors(graph: Graph, table: OpTable) -> Iterator[str]:
    for node in graph.module.graph.nodes:
        for x in tensors_of(node):
            if x.dtype in (torch.float64, torch.complex128):
                yield f"{node.name} ({node.target}) is {x.dtype}; the device has no such numbers"
            if not all(isinstance(size, int) for size in x.shape):
                yield f"{node.name} ({node.target}) has a shape that is not fixed: {tuple(x.shape)}"
            if node.op == "call_function" and table.needs_float32(str(node.target)) and x.dtype == torch.bfloat16:
                yield f"{node.name} ({node.target}) is computed in bfloat16; it needs float32"


def tensors_of(node: fx.Node) -> Iterator[Tensor]:
    """The tensors that a node makes, without memory."""
    value = node.meta.get("val")
    for x in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(x, Tensor):
            yield x
