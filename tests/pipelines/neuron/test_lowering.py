"""Graphs become StableHLO by torch-mlir, and XLA's CPU computes what torch does. Run by `make test-neuron`."""

from __future__ import annotations

import pytest
import torch

from pipelines.neuron.checks.lowering import LoweringError, lower
from pipelines.neuron.checks.lowering_child import PADS
from tests.bmojo.model_family import small_config
from tests.pipelines.neuron.checked_models import CHECKED, SEQ_LEN, checked_config

REFUSED = {"kda", "mamba", "mamba3", "gated_deltanet", "bmojo of Gated DeltaNet"}
refused = pytest.mark.xfail(reason="torch-mlir 20261001 refuses the backward; the forward agrees", strict=True)


@pytest.mark.neuron
@pytest.mark.parametrize("name", [pytest.param(name, marks=refused if name in REFUSED else ()) for name in CHECKED])
def test_every_graph_lowers_and_agrees(name):
    found = lower(checked_config(**CHECKED[name]), SEQ_LEN, batch=1)
    assert len(found) == 2 * 2 * 2, "of a block and the loss, forward and backward, in two precisions"
    for graph in found:
        assert graph.failure is None, graph
        assert graph.bytes < 500_000, graph  # a gather of the whole memory is a hundredfold
        assert graph.error is None or graph.error < 1e-5, graph
    assert [graph.error is None for graph in found] == [graph.precision == "bfloat16" for graph in found]


@pytest.mark.neuron
def test_a_process_that_runs_out_of_memory_says_where():
    config = small_config(pattern="swa", window_size=128)
    with pytest.raises(LoweringError, match="ended with"):
        lower(config, seq_len=512, batch=1, memory_bytes=1 << 30)


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 5), (1, 2**63 - 1), (0, -1), (-2, 2**63 - 1)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_gradient_of_a_slice_is_a_pad(dim, start, end):
    sizes = [5, 5]
    grad = torch.randn(torch.ops.aten.slice(torch.zeros(sizes), dim, start, end).shape)
    expected = torch.ops.aten.slice_backward(grad, sizes, dim, start, end, 1)
    assert torch.equal(PADS[torch.ops.aten.slice_backward.default](grad, sizes, dim, start, end, 1), expected)


def test_an_environment_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make neuron-checks"):
        lower(small_config(), seq_len=512, batch=1, python=tmp_path / "python")
