"""All checks of a model's graphs at once: what a compiler would be given, what is wrong with it, whether it lowers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmojo import ModelConfig
from pipelines.neuron.checks.graphs import Graph, findings, graphs_of
from pipelines.neuron.checks.lowering import PYTHON, Lowered, LoweringError, lower
from pipelines.neuron.checks.op_table import op_table

MOST_ERROR = 1e-4
"""Of XLA's outputs in float32, relative to the largest number of each; what was seen is a hundredth of it."""


@dataclass(frozen=True)
class GraphReport:
    """problems: one line each; none: all is well.  lowered: by torch-mlir; empty: it was not asked, or failed whole."""

    graphs: Sequence[Graph]
    problems: Sequence[str]
    lowered: Sequence[Lowered]

    def __str__(self) -> str:
        nodes, largest = sum(graph.num_nodes for graph in self.graphs), max(graph.largest for graph in self.graphs)
        text = f"{len(self.graphs)} graphs of {nodes} operators, largest tensor {largest / 2**20:.0f} MiB"
        if not self.lowered:
            return f"{text}; not lowered"
        size, error = sum(each.bytes or 0 for each in self.lowered), max(each.error or 0.0 for each in self.lowered)
        return f"{text}; StableHLO {size / 1000:.0f} kB, XLA's CPU within {error:.0e} of torch"


def report_graphs(config: ModelConfig, seq_len: int, batch: int) -> GraphReport:
    """Check the graphs of a training step on packed documents, and lower them if the environment for it is there:
    seconds to minutes.

    Raises: torch's error for a part that is not one graph.
    """
    graphs = graphs_of(config, seq_len, batch, documents=True)
    problems, lowered = findings(graphs, op_table()), list[Lowered]()
    if PYTHON.exists():
        try:
            lowered = lower(config, seq_len, batch)
        except LoweringError as error:
            problems.append(str(error))
    return GraphReport(graphs, [*problems, *(line for each in lowered for line in _wrong(each))], lowered)


def _wrong(found: Lowered) -> list[str]:
    name = f"{found.graph} in {found.precision}"
    if found.failure is not None:
        return [f"{name} does not lower: {found.failure}"]
    if found.error is not None and not found.error <= MOST_ERROR:
        return [f"{name}: XLA's CPU is {found.error:.1e} away from torch"]
    return []
