"""The graphs of a training step: those of every model are clean, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bmojo import ModelConfig
from bmojo.mixers import MIXERS
from bmojo.mixers.selection import RULES
from pipelines.neuron.checks.graphs import Recorder, findings, fresh_compiler, graphs_of
from pipelines.neuron.checks.op_table import op_table
from pipelines.stages.train.backends.neuron_config import REFUSED_RULES
from tests.bmojo.model_family import small_config
from tests.pipelines.neuron.checked_models import OPTIONS, SEQ_LEN, checked_config
from tests.pipelines.neuron.planted import FAULTS, planted


def require_clean(config: ModelConfig) -> None:
    """One forward and one backward of each part, of listed operators, in fixed shapes, float32 where it is needed."""
    graphs = graphs_of(config, SEQ_LEN, batch=1, documents=True)
    assert sorted(graph.name for graph in graphs) == sorted(
        f"{part} {direction}" for part in {*config.mixers, "loss"} for direction in ("forward", "backward")
    )
    assert findings(graphs, op_table()) == []


@pytest.mark.ci
def test_the_graphs_of_every_mixer_are_clean():
    """All in one model, which costs less than one of each."""
    require_clean(checked_config(pattern=",".join(MIXERS)))


@pytest.mark.slow
@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_options_leave_them_clean(fields):
    require_clean(checked_config(**fields))


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(set(RULES) - {*REFUSED_RULES, "innovation"}))
def test_a_selection_rule_that_is_not_refused_leaves_them_clean(rule):
    threshold = 1.0 if rule == "threshold" else None
    require_clean(checked_config(pattern="bmojo", selection=rule, selection_threshold=threshold))


def found(function: Callable[[Tensor], Tensor], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with the graphs of a function that is called with these shapes."""
    recorder = Recorder()
    with fresh_compiler():
        compiled = recorder.compile("part", function)
        for shape in shapes:
            compiled(torch.zeros(shape, dtype=dtype).requires_grad_()).sum().backward()
    return "\n".join(findings(recorder.graphs, op_table()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * 2, ""),
        (lambda x: x.cumprod(0), "part forward: aten.cumprod.default (1 times) is on the deny list: the device has no"),
        (lambda x: torch.erf(x), "part forward: aten.erf.default (1 times) is not in the op table"),
        (lambda x: (x.double() * 2).float(), "is torch.float64; the device has no such numbers"),
        (lambda x: x.bfloat16().exp().float(), "is computed in bfloat16; it needs float32"),
        (lambda x: torch.stack(x.split(2)), "aten.split.Tensor (1 times) is on the deny list"),
        (lambda x: x * x.sum().item(), "is torch.float64; the device has no such numbers"),
        (lambda x: x[x > 0], "aten.index.Tensor (1 times) is on the deny list: its shape depends on values"),
    ],
    ids=["none", "deny list", "unknown", "float64", "bfloat16", "split", "item", "boolean index"],
)
def test_a_planted_operator_is_found(function, message):
    lines = found(function, (4, 3))
    assert message in lines
    assert bool(lines) == bool(message)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("item", "is torch.float64; the device has no such numbers"),
        ("boolean index", "DynamicOutputShapeException"),
        ("float64", "is torch.float64; the device has no such numbers"),
        ("deny list", "swa forward: aten.cumprod.default (1 times) is on the deny list"),
        ("graph break", "Unsupported"),
    ],
)
def test_a_fault_in_a_model_is_found_or_ends_the_tracing(name, message):
    with planted(FAULTS[name]):
        try:
            lines = findings(graphs_of(small_config(pattern="swa"), seq_len=16, batch=1, documents=True), op_table())
        except (RuntimeError, NotImplementedError) as error:
            lines = [type(error).__name__]
    assert message in "\n".join(lines)


def test_a_changing_shape_is_found():
    assert "part forward: compiled 2 times; a shape" in found(lambda x: x * 2, (4, 3), (5, 3))
