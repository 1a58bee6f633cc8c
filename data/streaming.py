"""Training data: an endless, shuffled, resumable stream of micro batches, read ahead from shards wherever they are.

Order. Position p of training is one sample, by data.mixture and data.order: a formula of the seed. Global batch s is
positions s G to (s + 1) G - 1 (batches that grow: data.batches), whatever the number of workers and micro batches it is
dealt out to. So training on another number of workers sees the same samples in every optimizer step, and the position
is all the state there is.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from data.batches import Batches
from data.errors import DataError
from data.mds import MdsShard
from data.mixture import Mixture
from data.order import BLOCK_SAMPLES, Block, SampleOrder
from data.records import PackingFormat
from data.shards import TokenBatch, TokenSplit, collate

_OF_GROWING_BATCHES = ("batch_phases", "first_position")  # there only if batches grow or begin later
_BATCHES_AHEAD = 4
_POLL_S = 0.1
_END_S = 5.0


class Worker(NamedTuple):
    """The place of a process among those that train."""

    rank: int = 0
    world_size: int = 1


class StreamOrder(NamedTuple):
    """What the order of samples follows from, beside the data.

    Attributes:
        num_paths: stretches of the data that are read side by side, each by its own machines; it divides the global
            batch. Keep it when the number of machines changes.
        block_samples: samples that are shuffled among each other.
    """

    seed: int = 0
    shuffle: bool = True
    num_paths: int = 1
    block_samples: int = BLOCK_SAMPLES


class Place(NamedTuple):
    """Where one sample is."""

    source: int
    shard: int
    sample: int


class TokenStream:
    """This worker's micro batches, without end. Close it, or use `with`.

    Args:
        sources: the splits to read, each counted in the mixture by its number.
        micro_batch_size: samples in each batch of this worker.
        global_batch_size: samples in an optimizer step, over all workers.
        batches: which positions each step reads; None: all of them global_batch_size, from the first position on.
        pin_memory: put batches into page-locked memory, from which a GPU copies without waiting.
    Raises:
        DataError: the sources do not fit together, or hold less than one global batch.
        ValueError: the workers or paths do not divide the global batch.
    """

    def __init__(
        self,
        sources: Sequence[TokenSplit],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        order: StreamOrder,
        worker: Worker,
        batches: Batches | None = None,
        mixture: Mixture | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._batches = batches or Batches(global_batch_size)
        for size in (*(phase.size for phase in self._batches.phases), global_batch_size):
            _check_division(micro_batch_size, size, order.num_paths, worker)
        self.format = _common_format(sources)
        self._sources, self._mixture, self.worker = sources, mixture or Mixture.of_one(), worker
        self.micro_batch_size, self._global_batch_size = micro_batch_size, global_batch_size
        self._order, self._pin_memory = order, pin_memory
        self._orders = [
            SampleOrder(source.index.shard_samples, order.seed, order.shuffle, order.num_paths, order.block_samples)
            for source in sources
        ]
        self.num_samples = sum(each.num_samples for each in self._orders)
        if self.num_samples < global_batch_size or min(each.num_samples for each in self._orders) < order.num_paths:
            raise DataError(
                f"{sources[0].files}: {self.num_samples} samples of {self.format.seq_len} tokens, fewer than one "
                f"global batch of {global_batch_size}. Give more text, or lower global_batch_size or seq_len."
            )
        self.first_step = 0
        self._reader: _Reader | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[TokenBatch]:
        """The iteration over the stream, from where it stands, one at a time. Raises RuntimeError when closed."""
        if self._is_closed:
            raise RuntimeError("The stream is closed.")
        if self._reader is None:
            self._reader = _Reader(self, self._sources, self._orders)
        return self._reader

    def places(self, step: int, worker: Worker | None = None) -> list[Place]:
        """Where the samples of a worker, by default this one, in global batch `step` (from 0) are, in their order."""
        sources, own = self._part(step, worker or self.worker)
        places = np.empty((len(own), 3), np.int64)
        for number in np.unique(sources).tolist():
            mine = sources == number
            shards, samples = self._orders[number].at(own[mine])
            places[mine] = np.stack((np.full_like(shards, number), shards, samples), axis=-1)
        return [Place(*row) for row in places.tolist()]

    def sample_number(self, place: Place) -> int:
        """The number in its source's split of the sample at a place."""
        index = self._sources[place.source].index
        return int(index.sample_ends[place.shard]) - int(index.shard_samples[place.shard]) + place.sample

    def blocks(self, step: int) -> list[tuple[int, Block]]:
        """The sources and blocks that this worker's samples of a global batch belong to."""
        sources, own = self._part(step, self.worker)
        return [
            (number, block)
            for number in np.unique(sources).tolist()
            for block in self._orders[number].blocks(own[sources == number])
        ]

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """Where the stream stands once `num_samples` are done, and which data and order that refers to. JSON.

        Args:
            num_samples: samples since the very beginning of the data, over all workers and epochs: the position of
                the next step's first one. What the stream has read ahead of that does not count.
        """
        return {"num_samples": num_samples, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` says, before the iteration begins.

        Raises: DataError: the state belongs to other data or another order. RuntimeError: the iteration has started.
        """
        if self._reader is not None:
            raise RuntimeError("load_state_dict comes before the iteration over the stream.")
        self._require(state, self._identity | {name: self._identity.get(name) for name in _OF_GROWING_BATCHES})
        self.first_step = self._batches.step_at(int(state["num_samples"]))

    def require_same_order(self, state: dict[str, Any]) -> None:
        """Refuse a state, of another training, whose positions are other samples. Its batches may have other sizes.

        Raises: DataError: the state belongs to other data or another order.
        """
        of_batches = {"global_batch_size", *_OF_GROWING_BATCHES}
        self._require(state, {name: here for name, here in self._identity.items() if name not in of_batches})

    def _require(self, state: dict[str, Any], expected: dict[str, Any]) -> None:
        differing = [name for name, here in expected.items() if state.get(name) != here]
        if differing:
            details = "; ".join(f"{name} {state.get(name)!r} then, {expected[name]!r} now" for name in differing)
            raise DataError(
                f"{self._sources[0].files}: the checkpoint stands in another stream of data: {details}. "
                "Resume with the shards and settings it was made with, or start from its weights in a new stage."
            )

    def stop(self) -> None:
        """End the iteration, so that load_state_dict and another iteration may follow."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def batch_of(self, samples: Sequence[dict[str, np.ndarray]]) -> TokenBatch:
        """One micro batch of samples."""
        batch = collate(samples, self.format)
        return batch.map(lambda tensor: tensor.pin_memory()) if self._pin_memory else batch

    def close(self) -> None:
        """Stop reading ahead. Closing twice does no harm."""
        self._is_closed = True
        self.stop()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "index_sha256": [source.index.sha256 for source in self._sources],
            "split": self._sources[0].split,
            "global_batch_size": self._global_batch_size,
            "mixture": [[phase.start, [str(share) for share in phase.shares]] for phase in self._mixture.phases],
            **self._order._asdict(),
            **self._batches.identity,
        }

    def _part(self, step: int, worker: Worker) -> _Part:
        """A worker's samples of a global batch."""
        first, size = self._batches.start(step), self._batches.size(step)
        sources, own = self._mixture.at(np.arange(first, first + size))
        share = size // worker.world_size
        by_path = np.argsort(own % self._order.num_paths, kind="stable")
        mine = by_path[worker.rank * share : (worker.rank + 1) * share]
        return _Part(sources[mine], own[mine])


class _Part(NamedTuple):
    """Number of the source, and the position in it, of each sample; int64."""

    sources: np.ndarray
    positions: np.ndarray


class _Reader:
    """Prepares micro batches in a thread, a few ahead of who trains, and has shards fetched a block ahead of itself."""

    def __init__(self, stream: TokenStream, sources: Sequence[TokenSplit], orders: Sequence[SampleOrder]) -> None:
        self._stream, self._sources, self._orders = stream, sources, orders
        self._blocks: list[tuple[int, Block]] = []
        self._open: dict[tuple[int, int], MdsShard] = {}
        self._ready: queue.Queue[TokenBatch | BaseException] = queue.Queue(_BATCHES_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> TokenBatch:
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # for whoever asks again
            raise batch
        return batch

    def stop(self) -> None:
        """End the thread. One that waits for a storage which is away is left behind: it ends with the process."""
        self._stopped.set()
        self._thread.join(_END_S)
        self._open.clear()

    def _read(self) -> None:
        try:
            for step in itertools.count(self._stream.first_step):
                self._follow(self._stream.blocks(step))
                places = self._stream.places(step)
                for first in range(0, len(places), self._stream.micro_batch_size):
                    rows = [self._sample(place) for place in places[first : first + self._stream.micro_batch_size]]
                    if not self._hand_over(self._stream.batch_of(rows)):
                        return
        except BaseException as error:  # raised again by __next__, in the thread that trains
            self._hand_over(error)

    def _hand_over(self, batch: TokenBatch | BaseException) -> bool:
        """Whether it was taken; not when the stream is closed."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._ready.put(batch, timeout=_POLL_S)
                return True
        return False

    def _sample(self, place: Place) -> dict[str, np.ndarray]:
        key = place.source, place.shard
        if key not in self._open:
            self._open[key] = self._sources[place.source].open_shard(place.shard)
        return self._open[key].sample(place.sample)

    def _follow(self, blocks: list[tuple[int, Block]]) -> None:
        """Close the shards of blocks that are over; have those of these and the next ones fetched."""
        if blocks == self._blocks:
            return
        self._blocks = blocks
        now = {(source, shard) for source, block in blocks for shard in self._orders[source].shards_of(block)}
        self._open = {key: shard for key, shard in self._open.items() if key in now}
        ahead = [(source, self._orders[source].next_block(block)) for source, block in blocks]
        for number, source in enumerate(self._sources):
            shards = [
                shard
                for origin, block in (*blocks, *ahead)
                if origin == number
                for shard in self._orders[number].shards_of(block)
            ]
            source.files.fetch_ahead(source.split, [source.index.entry(shard) for shard in dict.fromkeys(shards)])


def _common_format(sources: Sequence[TokenSplit]) -> PackingFormat:
    first, *others = sources
    for other in others:
        if other.index.format != first.index.format:
            raise DataError(
                f"{first.files} and {other.files} cannot be mixed: {first.index.format} and {other.index.format}. "
                "Tokenize both with one tokenizer and seq_len."
            )
    return first.index.format


def _check_division(micro_batch_size: int, global_batch_size: int, num_paths: int, worker: Worker) -> None:
    if global_batch_size % (micro_batch_size * worker.world_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
            f"{worker.world_size} workers. Change one of them."
        )
    if global_batch_size % num_paths:
        raise ValueError(f"global_batch_size={global_batch_size} is not a multiple of num_paths={num_paths}.")
