"""The graphs of a training step under FSDP2: parameters are gathered around each block, outside of its graph.

So a graph must not differ from the one where every worker holds the whole model (zero1). A process group that sends
nothing stands in for two workers: what is gathered has no meaning, and shapes are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bmojo import BMojoLM, ModelConfig
from pipelines.neuron.checks.graphs import Graph, Recorder, fresh_compiler, one_layer_per_mixer, record_parts, step


def sharded_graphs_of(config: ModelConfig, seq_len: int, batch: int, *, documents: bool) -> list[Graph]:
    """As graphs.graphs_of, with FSDP2 over two workers, and with memory."""
    model, recorder = BMojoLM(one_layer_per_mixer(config)), Recorder()
    with _two_workers(), fresh_compiler():
        mesh = init_device_mesh("cpu", (2,))
        record_parts(model, recorder)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        step(model, torch.zeros(batch, seq_len, dtype=torch.int64), documents, bf16=True)
    return recorder.graphs


@contextmanager
def _two_workers() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()
