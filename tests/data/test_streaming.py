"""The training stream: the same global batches for every number of workers, exact resume, data identity."""

from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import FilesSource, TokenizeFields
from data.errors import DataError
from data.packing import merge_slices, write_slice
from data.sources import plan_slices
from data.streaming import TokenStream, open_stream, read_token_batches
from data.tokenizer import Tokenizer

NUM_DOCUMENTS = 300
GLOBAL_BATCH = 24


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred samples of 16 tokens in several slices and shards."""
    folder = tmp_path_factory.mktemp("shards")
    path = folder / "corpus.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 10**6, rng.integers(1, 8)))) for _ in range(NUM_DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = TokenizeFields(
        source=FilesSource(kind="files", paths=(str(path),)),
        seq_len=16,
        slice_bytes=4096,
        shard_bytes=4096,
        validation_fraction=0,
    )
    records = [write_slice(slice_, tokenizer, fields, folder) for slice_ in plan_slices(fields.source, 4096)]
    merge_slices(folder, records, fields)
    return folder


def open_train(shards: Path, micro_batch_size: int = 4, **settings: Any) -> TokenStream:
    return open_stream(
        shards, "train", micro_batch_size=micro_batch_size, **{"global_batch_size": GLOBAL_BATCH, **settings}
    )


def rows(batch: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in batch.tokens_bt]


def test_an_epoch_holds_each_sample_once_but_the_few_left_out(shards: Path) -> None:
    everything = [row for batch in read_token_batches(shards, "train", 64) for row in rows(batch)]
    with open_train(shards) as stream:
        num_batches = stream.samples_per_epoch // 4
        epochs = [[row for batch in islice(iter(stream), num_batches) for row in rows(batch)] for _ in range(2)]
    assert len(everything) - GLOBAL_BATCH < stream.samples_per_epoch <= len(everything)
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == stream.samples_per_epoch
        assert set(epoch) <= set(everything)
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1]), "other samples are left out in each epoch"


def test_without_shuffling_the_samples_come_in_their_order(shards: Path) -> None:
    (everything,) = read_token_batches(shards, "train", 10_000)
    with open_train(shards, shuffle=False) as stream:
        first = [row for batch in islice(iter(stream), 6) for row in rows(batch)]
    assert [row for row in rows(everything) if row in set(first)] == first


@settings(max_examples=10, deadline=None)
@given(step=st.integers(0, 40), seed=st.integers(0, 3))
def test_resuming_at_any_step_gives_exactly_the_remaining_batches(shards: Path, step: int, seed: int) -> None:
    micro_batches = GLOBAL_BATCH // 4
    with open_train(shards, seed=seed) as stream:
        batches = iter(stream)
        for _ in range(step * micro_batches):
            next(batches)
        state = json.loads(json.dumps(stream.state_dict(step * GLOBAL_BATCH)))
        expected = [next(batches) for _ in range(3 * micro_batches)]
    with open_train(shards, seed=seed) as stream:
        stream.load_state_dict(state)
        for want, got in zip(expected, stream, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


SPLITS_OF_24 = [  # machines, workers on each, micro batch size
    (1, 1, 24), (1, 1, 4), (1, 2, 12), (1, 2, 3), (1, 3, 4), (1, 4, 6), (1, 4, 2),
    (2, 1, 4), (2, 2, 3), (2, 2, 6), (4, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("num_canonical_nodes", [1, 2])
def test_every_split_over_workers_gives_the_same_global_batches(shards: Path, num_canonical_nodes: int) -> None:
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    with open_train(shards, num_canonical_nodes=num_canonical_nodes) as stream:
        dataset = stream._dataset
        dataset._set_shuffle_block_size(dataset._unique_rank_world)
        for epoch, done in [(0, 0), (0, 3 * GLOBAL_BATCH), (2, 0), (1, 5 * GLOBAL_BATCH)]:
            global_batches = set()
            for num_nodes, ranks_per_node, micro_batch_size in SPLITS_OF_24:
                if num_nodes % num_canonical_nodes and num_canonical_nodes % num_nodes:
                    continue
                dataset.batch_size = micro_batch_size
                work = generate_work("random", dataset, World(num_nodes, ranks_per_node, 1, 0), epoch, done)
                assert (work >= 0).all(), "no padding"
                # (nodes, ranks, 1, batches, micro batch) -> (nodes x ranks, steps, samples of the step)
                share = GLOBAL_BATCH // (num_nodes * ranks_per_node)
                by_step = (
                    work.reshape(num_nodes * ranks_per_node, -1, share).transpose(1, 0, 2).reshape(-1, GLOBAL_BATCH)
                )
                assert len(by_step) == (stream.samples_per_epoch - done) // GLOBAL_BATCH
                global_batches.add(tuple(tuple(sorted(step)) for step in by_step.tolist()))
            assert len(global_batches) == 1


def worker(rank: int, world_size: int, port: int, shards: Path, num_steps: int, state: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    micro = GLOBAL_BATCH // world_size // 2
    with open_train(shards, micro_batch_size=micro) as stream:
        if state is not None:
            stream.load_state_dict(state)
        steps = [[row for _ in range(2) for row in rows(next(iter(stream)))] for _ in range(num_steps)]
        torch.distributed.barrier()
    results.put(steps)
    torch.distributed.destroy_process_group()


def test_real_workers_share_the_global_batches_of_one_worker_across_epochs(shards: Path) -> None:
    with open_train(shards, micro_batch_size=GLOBAL_BATCH) as stream:
        steps_per_epoch = stream.samples_per_epoch // GLOBAL_BATCH
        start, num_steps = steps_per_epoch - 3, 6
        state = stream.state_dict(start * GLOBAL_BATCH)
        expected = [sorted(rows(batch)) for batch in islice(iter(stream), start, start + num_steps)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.streaming", "streaming"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(rank, 2, port, shards, num_steps, state, results)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    shares = [results.get() for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [sorted(shares[0][step] + shares[1][step]) for step in range(num_steps)] == expected


def test_a_checkpoint_of_other_data_or_settings_is_refused(shards: Path) -> None:
    with open_train(shards) as stream:
        state = stream.state_dict(48)
        for name, value in {"index_sha256": "0" * 64, "seed": 9, "global_batch_size": 12}.items():
            with pytest.raises(DataError, match=rf"another stream of data: {name} .* then, .* now"):
                stream.load_state_dict({**state, name: value})


def test_state_is_loaded_before_the_iteration_and_a_closed_stream_says_so(shards: Path) -> None:
    stream = open_train(shards)
    next(iter(stream))
    with pytest.raises(RuntimeError, match="before the iteration"):
        stream.load_state_dict(stream.state_dict(0))
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        iter(stream)


def test_too_little_data_and_workers_that_do_not_divide_are_errors(shards: Path) -> None:
    with pytest.raises(DataError, match="fewer than one global batch of 4096"):
        open_train(shards, global_batch_size=4096)
    with pytest.raises(ValueError, match="global_batch_size=24 is not a multiple of micro_batch_size=5 x 1 workers"):
        open_train(shards, micro_batch_size=5)


def test_several_workers_without_torch_distributed_are_an_error(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group first"):
        open_train(shards)


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other runs on this machine have segments too: theirs are those registered in the usual place, ours are not."""
    usual_registry = Path(tempfile.gettempdir(), f"bmojo-streaming-{getpass.getuser()}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = shared_segments()
    yield
    others = registered(usual_registry)
    left = shared_segments() - before
    others |= registered(usual_registry)
    assert not {name for name in left if not any(0 <= int(name.split("_")[0]) - first < 16 for first in others)}


def shared_segments() -> set[str]:
    names = os.listdir("/dev/shm") if Path("/dev/shm").is_dir() else []
    return {name for name in names if name.endswith(("_locals", "_barrier", "_resume"))}


def registered(registry: Path) -> set[int]:
    return {int(lock.stem) for lock in registry.glob("*.lock")}
