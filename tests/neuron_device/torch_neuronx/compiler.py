"""The torch.compile backend `neuron` of the stand-in: runs the graph that Dynamo captured, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

graphs: list[torch.fx.GraphModule] = []
"""All that were captured in this process."""


def neuron(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """As Dynamo calls a backend."""
    graphs.append(graph)
    run: Callable[..., Any] = graph.forward
    return run
