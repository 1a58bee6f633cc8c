"""Lower a model's graphs to StableHLO with torch-mlir, and run that program on XLA's CPU: a process of its own.

torch-mlir is the front end that AWS's compiler has too. It may crash, or ask for all memory there is, so this process
has a limit and says what it is at. Its environment has torch-mlir and jax beside the main one's packages:
`make test-neuron` builds it. As a program: `python -m pipelines.neuron.checks.lowering_child REQUEST.json`; it writes a
line of JSON for each graph.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from bmojo import ModelConfig
from pipelines.neuron.checks.graphs import Graph, Values, graphs_of, graphs_with_values


def lowered(module: fx.GraphModule) -> str:
    """The StableHLO of a graph. Raises: what torch-mlir raises: some operator does not lower."""
    from torch_mlir import fx as torch_mlir
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    table = {**get_decomposition_table(), **PADS}
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with mode:
        simpler = make_fx(lambda *given: tensors(module(*given)), decomposition_table=table)(*inputs)
    return str(torch_mlir.stateless_fx_import(simpler, output_type="stablehlo"))


def tensors(outputs: Sequence[Any]) -> list[Tensor]:
    """Without the gradients of what has none."""
    return [x for x in outputs if isinstance(x, Tensor)]


def _slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """A pad, where torch's own decomposition is a scatter."""
    if step != 1:
        raise NotImplementedError(f"a slice with a step of {step} has a backward that is a scatter")
    dim %= len(sizes)
    first, last, _ = slice(start, end).indices(sizes[dim])  # negative ones count from the end
    return F.pad(grad, [0, 0] * (len(sizes) - 1 - dim) + [first, sizes[dim] - last])


def _select_backward(grad: Tensor, sizes: list[int], dim: int, index: int) -> Tensor:
    dim, index = dim % len(sizes), index % sizes[dim]
    return _slice_backward(grad.unsqueeze(dim), sizes, dim, index, index + 1, 1)


PADS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.slice_backward.default: _slice_backward,
    torch.ops.aten.select_backward.default: _select_backward,
}


def run_on_xla(program: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a StableHLO program on XLA's CPU."""
    import jax
    import numpy as np
    from jax._src.lib import xla_client

    jax.config.update("jax_enable_x64", True)
    devices = tuple(jax.devices("cpu")[:1])
    options = xla_client.CompileOptions()
    loaded = devices[0].client.compile_and_load(program, xla_client.DeviceList(devices), options)
    arrays = [jax.device_put(x.detach().numpy(), devices[0]) for x in inputs]
    found = loaded.execute_sharded(arrays).disassemble_into_single_device_arrays()
    return [torch.from_numpy(np.array(parts[0])) for parts in found]


def largest_error(values: Values, outputs: Sequence[Tensor]) -> float:
    """Relative to the largest number of each output."""
    worst = 0.0
    for got, want in zip(outputs, tensors(values.outputs), strict=True):
        difference = (got.double() - want.detach().double()).abs().max() if want.numel() else torch.zeros(())
        worst = max(worst, float(difference / want.detach().double().abs().max().clamp_min(1e-6)))
    return worst


def report(graph: Graph, precision: str, values: Values | None) -> dict[str, Any]:
    """What became of one graph."""
    started = time.monotonic()
    print(f"lowering {graph.name} in {precision}", file=sys.stderr, flush=True)
    line: dict[str, Any] = {"graph": graph.name, "precision": precision, "nodes": graph.num_nodes}
    try:
        program = lowered(graph.module)
        line["bytes"] = len(program)
        if values is not None:
            print(f"running {graph.name} on XLA", file=sys.stderr, flush=True)
            line["error"] = largest_error(values, run_on_xla(program, tensors(values.inputs)))
    except Exception as error:  # of torch-mlir or XLA, for whoever reads the report
        line["failure"] = f"{type(error).__name__}: {error}"[:2000]
    line["seconds"] = round(time.monotonic() - started, 1)
    return line


def main(arguments: list[str]) -> None:
    """Read a request (see lowering.Request), and write a line per graph."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    config = ModelConfig.model_validate(request["model"])
    seq_len, batch, documents = request["seq_len"], request["batch"], request["documents"]
    if "bfloat16" in request["precisions"]:
        for graph in graphs_of(config, seq_len, batch, documents=documents):
            print(json.dumps(report(graph, "bfloat16", None)), flush=True)
    if "float32" in request["precisions"]:
        recorder = graphs_with_values(config, seq_len, batch, documents=documents)
        for graph in recorder.graphs:
            print(json.dumps(report(graph, "float32", recorder.values[graph.name])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
