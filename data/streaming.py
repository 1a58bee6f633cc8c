"""Training data: an endless, shuffled, resumable stream of micro batches out of MDS shards (mosaicml-streaming).

Order. An epoch is a fixed sequence of samples (by seed and epoch number), cut into global batches: batch s is samples
s G to (s + 1) G - 1 of it, whatever the number of workers and micro batches it is dealt out to. Inside it worker w of W
takes every W-th sample from the w-th on. The last samples of an epoch that fill no global batch are left out, others in
each epoch. So training on another number of workers sees the same samples in every optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.world import World

from data.errors import DataError
from data.records import PackingFormat, Split
from data.shards import TokenBatch, check_shards, collate, read_index, read_token_batches, read_token_documents
from data.shared_memory import Namespace, close_segments

__all__ = ["TokenBatch", "TokenStream", "open_stream", "read_token_batches", "read_token_documents"]

_SHUFFLE_BLOCK_SAMPLES = 1 << 18  # samples of one shard are spread over about so many
_SAMPLES_LEFT_OUT_TOGETHER = 64


class TokenStream:
    """This worker's micro batches, epoch after epoch, without end. Made by `open_stream`; close it, or use `with`.

    Attributes:
        format: how the tokens are to be read.
        samples_per_epoch: samples over all workers; a multiple of the global batch size.
    """

    def __init__(
        self,
        dataset: Any,
        namespace: Namespace,
        format_: PackingFormat,
        identity: dict[str, Any],
        is_local_leader: bool,
    ) -> None:
        self.format = format_
        self.samples_per_epoch = int(identity["samples_per_epoch"])
        self._dataset, self._namespace, self._identity = dataset, namespace, identity
        self._is_local_leader = is_local_leader
        self._loader = StreamingDataLoader(
            dataset, batch_size=dataset.batch_size, num_workers=0, collate_fn=partial(collate, format_=format_)
        )
        self._batches: Iterator[TokenBatch] | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[TokenBatch]:
        """The one iteration over the stream, from where it stands. Raises RuntimeError when closed."""
        if self._is_closed:
            raise RuntimeError("The stream is closed.")
        if self._batches is None:
            self._batches = self._each_batch()
        return self._batches

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Where the stream stands once `num_samples` are done, and which data and order that refers to. JSON.

        Args:
            num_samples: samples trained on since the very beginning, over all workers and epochs:
                steps x global_batch_size. What the stream has read ahead of that does not count.
        """
        return {"num_samples": num_samples, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` says; every worker calls it, before the iteration begins.

        Raises: DataError: the state belongs to other data or another order. RuntimeError: the iteration has started.
        """
        if self._batches is not None:
            raise RuntimeError("load_state_dict comes before the iteration over the stream.")
        differing = [name for name, here in self._identity.items() if state.get(name) != here]
        if differing:
            details = "; ".join(f"{name} {state.get(name)!r} then, {self._identity[name]!r} now" for name in differing)
            raise DataError(
                f"{self._dataset.streams[0].local}: the checkpoint stands in another stream of data: {details}. "
                "Resume with the shards and settings it was made with, or start from its weights in a new stage."
            )
        epoch, sample_in_epoch = divmod(int(state["num_samples"]), self.samples_per_epoch)
        if self._is_local_leader:
            self._dataset.load_state_dict(
                {
                    "epoch": epoch,
                    "sample_in_epoch": sample_in_epoch,
                    "num_canonical_nodes": self._dataset.num_canonical_nodes,
                    "shuffle_seed": self._dataset.shuffle_seed,
                    "initial_physical_nodes": None,
                }
            )
        if dist.is_initialized():
            dist.barrier()

    def close(self) -> None:
        """Stop the threads that read ahead, then give the shared memory back. Closing twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        if hasattr(self._dataset, "_iterator"):
            self._dataset._iterator.exit()
        if hasattr(self._dataset, "_executor"):
            self._dataset._executor.shutdown(wait=True)
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]  # a generator
        close_segments(self._dataset)
        self._namespace.release()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each_batch(self) -> Iterator[TokenBatch]:
        while True:
            yield from self._loader


def open_stream(
    shards_dir: Path,
    split: Split,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    num_canonical_nodes: int = 1,
    scratch_dir: Path | None = None,
) -> TokenStream:
    """Open a split for training, in every worker at the same time.

    The worker's place comes from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and Ray Train set them.
    Args:
        micro_batch_size: samples in each batch of this worker.
        global_batch_size: samples in an optimizer step, over all workers.
        num_canonical_nodes: independent paths through the shards; with as many as machines, each machine reads its own
            shards. Part of the order: keep it when the number of machines changes.
        scratch_dir: folder on this machine where open streams are registered, see data.shared_memory.
    Raises:
        DataError: the shards are missing or damaged, or hold less than one global batch.
        ValueError: the workers do not divide the global batch, or the machines the canonical nodes.
        RuntimeError: there are several workers, but torch.distributed is not initialised.
    """
    index = read_index(shards_dir, split)
    check_shards(index)
    world = World.detect()
    _check_division(world, micro_batch_size, global_batch_size, num_canonical_nodes)
    unit = math.lcm(global_batch_size, num_canonical_nodes)
    samples_per_epoch = index.counts.num_samples // unit * unit
    if not samples_per_epoch:
        raise DataError(
            f"{index.folder}: {index.counts.num_samples} samples of {index.format.seq_len} tokens, fewer than one "
            f"global batch of {unit}. Give more text, or lower global_batch_size or seq_len."
        )
    namespace = Namespace(world.rank, world.num_ranks, world.ranks_per_node, scratch_dir)
    with namespace.entered():
        dataset = StreamingDataset(
            local=str(shards_dir),
            split=split,
            batch_size=micro_batch_size,
            epoch_size=samples_per_epoch,
            sampling_granularity=_SAMPLES_LEFT_OUT_TOGETHER,
            num_canonical_nodes=num_canonical_nodes,
            shuffle=shuffle,
            shuffle_seed=seed,
            shuffle_block_size=_SHUFFLE_BLOCK_SAMPLES,
        )
    identity = {
        "index_sha256": index.sha256,
        "split": split,
        "samples_per_epoch": samples_per_epoch,
        "global_batch_size": global_batch_size,
        "shuffle": shuffle,
        "seed": seed,
        "num_canonical_nodes": num_canonical_nodes,
    }
    return TokenStream(dataset, namespace, index.format, identity, world.is_local_leader)


def _check_division(world: Any, micro_batch_size: int, global_batch_size: int, num_canonical_nodes: int) -> None:
    if global_batch_size % (micro_batch_size * world.num_ranks):
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"{world.num_ranks} workers. Change one of them."
        )
    if num_canonical_nodes % world.num_nodes and world.num_nodes % num_canonical_nodes:
        raise ValueError(
            f"num_canonical_nodes={num_canonical_nodes} and the number of machines {world.num_nodes}: one must be a "
            "multiple of the other. num_canonical_nodes=1 always works."
        )
