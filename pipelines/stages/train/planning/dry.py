"""Two real steps of a training on its real workers, which write nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch.distributed as dist

from bmojo import BMojoLM
from data.shards import TokenBatch
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.data import TokenSource, mixture_of
from pipelines.stages.train.device import explained_memory, peak_memory, pick_in_worker
from pipelines.stages.train.launch import run_workers
from pipelines.stages.train.planning.steps import Repeats, Steps, stand_in_tokens, take_steps
from pipelines.stages.train.worker import prepare_process

REPEATS = Repeats(dropped=1, fewest=2, enough_s=0.0, most=2)
"""The first step compiles, allocates and fills caches; the next two are what is asked for."""


def take_dry_steps(train: TrainStageConfig, seq_len: int, sources: Sequence[TokenSource]) -> Steps:
    """Start the workers of a training in the cluster that was joined, and take steps. Args: sources: none: random ids.

    Raises: UserError: they do not fit into memory. As run_workers.
    """
    loop_config = {"train": train, "seq_len": seq_len, "sources": tuple(sources)}
    return Steps.model_validate(run_workers(_worker, loop_config, train, "dry-run"))


def _worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    train: TrainStageConfig = loop_config["train"]
    with explained_memory(f"Lower micro_batch_size, or use {train.backend.memory_advice}."):
        return _steps(train, loop_config["seq_len"], loop_config["sources"]).model_dump()


def _steps(train: TrainStageConfig, seq_len: int, sources: Sequence[TokenSource]) -> Steps:
    prepare_process(train, dist.get_rank())
    device = pick_in_worker(train.on_gpu)
    start_bytes = peak_memory(device)
    model = BMojoLM(train.model)
    model.checkpoint_activations(train.activation_checkpointing)
    trainer = train.backend.start(model, train, device)
    with _batches(train, seq_len, sources) as micro_batches:
        steps = take_steps(trainer, train, micro_batches, start_bytes, REPEATS)
    return steps.model_copy(update={"tokens": "its tokens" if sources else "random tokens"})


@contextmanager
def _batches(train: TrainStageConfig, seq_len: int, sources: Sequence[TokenSource]) -> Iterator[list[TokenBatch]]:
    """The first micro batches that this worker would take; random ones if there are no tokens yet."""
    if not sources:
        assert train.model.vocab_size is not None
        yield stand_in_tokens(train, seq_len, train.model.vocab_size, dist.get_rank())
        return
    data = train.data
    stream = TokenStream(
        [token_split(source.artifact, "train", data.cache_bytes) for source in sources],
        micro_batch_size=train.worker_micro_batch_size,
        global_batch_size=train.global_batch_size,
        order=StreamOrder(train.seed, num_paths=data.paths, block_samples=data.shuffle_block_samples),
        worker=Worker(dist.get_rank(), dist.get_world_size()),
        mixture=mixture_of(train, sources, num_steps=1),
        pin_memory=train.on_gpu,
    )
    with stream:
        yield list(islice(iter(stream), train.accumulation_steps))
