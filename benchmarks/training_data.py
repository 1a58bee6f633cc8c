"""How fast training data is read, and what 10^9 samples cost: start, resume, memory, and how evenly the order spreads.

    python -m benchmarks.training_data

Prints: tokens/s of the loader on one core; seconds and resident memory of a fresh process that opens an index of 10^9
samples, resumes at 9 x 10^8 and reads its first batch; the chi-square of where samples of an epoch stand.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.index import TABLE_FILE, pack_index
from data.mds import BYTES, MdsWriter, array_of
from data.order import SampleOrder
from data.records import PackingFormat, ShardEntry, Split, SplitCounts
from data.shards import LocalShardFiles, TokenSplit
from data.streaming import StreamOrder, TokenStream, Worker

SEQ_LEN = 1024
NUM_SAMPLES = 10**9
SHARD_SAMPLES = 8000
RESUMED_AT = 9 * 10**8


def write_shard(folder: Path, num_samples: int) -> ShardEntry:
    """One shard of random tokens with a document every 200 of them."""
    rng = np.random.default_rng(0)
    writer = MdsWriter(folder, {"tokens": array_of("uint16"), "doc_starts": BYTES}, 1 << 31)
    for _ in range(num_samples):
        starts = np.flatnonzero(rng.random(SEQ_LEN) < 1 / 200).astype("<i4")
        writer.write({"tokens": rng.integers(0, 32_000, SEQ_LEN + 1), "doc_starts": starts.tobytes()})
    (entry,) = writer.finish()
    return entry


def write_split(folder: Path, num_samples: int) -> None:
    """An index of so many samples, all shards of which are one file."""
    entry = write_shard(folder / "train" / "slice-00000", SHARD_SAMPLES)
    num_shards = num_samples // SHARD_SAMPLES
    format_ = PackingFormat(
        seq_len=SEQ_LEN,
        eod_id=0,
        vocab_size=32_000,
        token_dtype="uint16",
        tokenizer_sha256="0" * 64,
        has_loss_mask=False,
    )
    counts = SplitCounts(
        num_documents=1, num_samples=num_samples, num_tokens=num_samples * SEQ_LEN, num_bytes=1, num_cut_documents=0
    )
    shards = [(number // 1000, entry._replace(name=f"shard.{number % 1000:05d}.mds")) for number in range(num_shards)]
    (folder / "train" / TABLE_FILE).write_bytes(pack_index(format_, counts, shards))


class OneFile(LocalShardFiles):
    """Shards that are all the first one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shard = folder / "train" / "slice-00000" / "shard.00000.mds"

    def open(self, split: Split, entry: ShardEntry) -> BinaryIO:
        return open(self._shard, "rb")

    def fetch_ahead(self, split: Split, entries: Sequence[ShardEntry]) -> None:
        pass


def stream_of(folder: Path, micro_batch_size: int, worker: Worker) -> TokenStream:
    """The stream over all of it."""
    return TokenStream(
        [TokenSplit(OneFile(folder), "train")],
        micro_batch_size=micro_batch_size,
        global_batch_size=256,
        order=StreamOrder(seed=1),
        worker=worker,
    )


def resume(folder: Path) -> None:
    """In a fresh process: open, resume, read the first batch; prints seconds and MB."""
    start = time.perf_counter()
    with stream_of(folder, 8, Worker(0, 8)) as stream:
        stream.load_state_dict(stream.state_dict(RESUMED_AT))
        next(iter(stream))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.perf_counter() - start:.2f} {peak_mb:.0f}")


def loader_rate(folder: Path, micro_batch_size: int) -> float:
    """Tokens per CPU second of the whole process."""
    with stream_of(folder, micro_batch_size, Worker()) as stream:
        batches = iter(stream)
        for _ in range(20):
            next(batches)
        start, num_batches = time.process_time(), 4000 // micro_batch_size
        for _ in range(num_batches):
            next(batches)
        return num_batches * micro_batch_size * SEQ_LEN / (time.process_time() - start)


def same_order(folder: Path, num_steps: int) -> bool:
    """Whether 1, 2, 4 and 8 workers have the same global batches."""
    orders = []
    for world_size in (1, 2, 4, 8):  # as many streams, of 32 samples per step each
        workers = [stream_of(folder, 8, Worker(rank, world_size)) for rank in range(world_size)]
        orders.append([sorted(place for each in workers for place in each.places(step)) for step in range(num_steps)])
    return all(order == orders[0] for order in orders)


def chi_square(num_samples: int, bins: int) -> tuple[float, int]:
    """Of the tenths of an epoch in which the samples of each tenth of the data stand; and the degrees of freedom."""
    order = SampleOrder(np.full(num_samples // SHARD_SAMPLES, SHARD_SAMPLES), seed=1)
    shards, _ = order.at(np.arange(num_samples))
    from_bin = shards * bins // (num_samples // SHARD_SAMPLES)
    to_bin = np.arange(num_samples) * bins // num_samples
    counts = np.histogram2d(from_bin, to_bin, bins=bins)[0] / SHARD_SAMPLES  # a shard moves as one
    expected = counts.sum() / bins**2
    return float(((counts - expected) ** 2 / expected).sum()), (bins - 1) ** 2


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_split(folder, NUM_SAMPLES)
        print(f"index of {NUM_SAMPLES:,} samples: {(folder / 'train' / TABLE_FILE).stat().st_size / 1e6:.1f} MB")
        imports = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        base = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True).stdout
        script = f"from pathlib import Path; from benchmarks.training_data import resume; resume(Path({name!r}))"
        for _ in range(3):
            start = time.perf_counter()
            found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
            seconds, peak_mb = found.split()
            print(
                f"open, resume at {RESUMED_AT:,}, first batch: {seconds} s; process with imports "
                f"{time.perf_counter() - start:.2f} s, {peak_mb} MB, of which {float(base):.0f} MB by `import torch`"
            )
        for micro_batch_size in (4, 32):
            rates = [loader_rate(folder, micro_batch_size) for _ in range(3)]
            print(f"loader, {micro_batch_size} x {SEQ_LEN}: {statistics.median(rates) / 1e6:.1f} M tokens per CPU s")
        print(f"same global batches for 1, 2, 4 and 8 workers over 1,000 steps: {same_order(folder, 1000)}")
    value, freedom = chi_square(8_000_000, 10)
    print(f"chi-square of 10 x 10 tenths over 8 M samples, in shards: {value:.0f} ({freedom} degrees of freedom)")


if __name__ == "__main__":
    main()
