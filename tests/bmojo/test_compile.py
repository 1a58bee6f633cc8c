"""The whole model is one graph to torch.compile, and computes what it computes without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo import BMojoLM
from bmojo.compiled import compile_parts
from bmojo.mixers import MIXERS
from kernels.operator import use
from tests.bmojo.model_family import build, random_tokens, small_config

pytestmark = pytest.mark.ci


def loss_and_gradients(call: nn.Module, model: nn.Module, tokens: Tensor, docs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = call(tokens, tokens, docs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "pattern", ["attention,mamba", pytest.param(",".join(MIXERS), marks=pytest.mark.slow)], ids=["two", "all"]
)
@pytest.mark.parametrize(
    ("path", "dtype", "tolerance"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)]
)
def test_the_whole_model_compiles_without_a_graph_break(path, dtype, tolerance, pattern):
    """Tolerances are relative to the largest gradient of a parameter: rounding grows with the terms that are added.

    Compiling all mixers takes a minute and a half. Below, they are traced as on a GPU, and compiled in parts.
    """
    config = small_config(pattern=pattern, window_size=4, innovation_predictor="learned", d_ff=8)
    model = build(config, dtype=dtype)
    tokens, docs = random_tokens(2, 8), torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
    with use(path):
        eager = loss_and_gradients(model, model, tokens, docs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = loss_and_gradients(compiled, model, tokens, docs)
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name


def test_parts_compile_to_one_graph_for_equal_blocks_and_one_for_the_loss():
    """On the static path. A second step adds none."""
    config = small_config(pattern="bmojo*3,mamba2*2", window_size=4, innovation_predictor="learned", d_ff=8)
    model = build(config, dtype=torch.float64)
    tokens, docs = random_tokens(2, 8), torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
    with use("torch"):
        eager = loss_and_gradients(model, model, tokens, docs)
    names = list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compile_parts(model, partial(torch.compile, backend=counter, fullgraph=True, dynamic=False))
    with use("static"):
        for _ in range(2):
            got = loss_and_gradients(model, model, tokens, docs)
            assert counter.frame_count == 3
    assert list(model.state_dict()) == names
    for name, value in eager.items():
        assert (got[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python asks of the driver is answered as on an H100; torch.compile cannot trace into it, as there."""

    @torch.compiler.disable
    def capability(device: torch.device | None = None) -> tuple[int, int]:
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)


@pytest.mark.usefixtures("hopper")
def test_it_is_one_graph_on_a_gpu_too():
    """On tensors that only say that they are on one, so that operators take their paths of a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    config = small_config(pattern=",".join(MIXERS), innovation_predictor="learned")
    with torch.device("meta"):
        model = BMojoLM(config)
    with FakeTensorMode():
        model._apply(lambda parameter: torch.empty(parameter.shape, device="cuda"))
        model.head.weight = model.embedding.weight
        tokens = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        compiled = torch.compile(model, fullgraph=True, backend=keep)
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens, tokens, tokens).loss
    assert loss.is_cuda
    (graph,) = graphs
    ours = {str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("bmojo.")}
    assert {"memory_attention", "ssd_scan", "causal_conv1d"} <= ours
