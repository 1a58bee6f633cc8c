"""Multi-query associative recall (MQAR, arXiv:2312.04927, section 3): a task that only a memory can solve.

    k1 v1 k2 v2 ... kP vP  . . . k2 . . k1 . . .        keys and values first, queries later among noise
                                 ^ v2   ^ v1            the target at a query is the value that stood behind its key

Keys are drawn from the ids below vocab_size / 2 without repetition, values from those above; noise is drawn from the
values, so that no key occurs but in its pair and its query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from base.config import StrictConfig
from data.tasks.task import NO_SOURCE, Task, TaskSequence

if TYPE_CHECKING:
    import numpy as np


class RecallConfig(StrictConfig):
    """One task. Lengths, positions and distances are in tokens."""

    vocab_size: int = Field(64, ge=4, description="Number of ids; the lower half are keys, the upper half values.")
    num_pairs: int = Field(8, ge=1, description="Pairs of key and value at the start.")
    seq_len: int = Field(64, ge=3, description="Length of a sequence.")
    num_queries: int = Field(8, ge=1, description="Queries, each for another pair.")
    min_distance: int = Field(1, ge=1, description="Least distance from a value to the query for its key.")
    noise: bool = Field(
        True, description="Fill the rest with random values; otherwise with id 0, which then is no key."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        num_keys = self.vocab_size // 2 - (not self.noise)
        if self.num_pairs > num_keys:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs as many keys, but vocab_size={self.vocab_size} has {num_keys}. "
                f"Set vocab_size to at least {2 * (self.num_pairs + (not self.noise))}."
            )
        if self.num_queries > self.num_pairs:
            raise ValueError(f"num_queries={self.num_queries} is more than num_pairs={self.num_pairs}; lower it.")
        if self.seq_len < self.first_query + self.num_queries:
            raise ValueError(
                f"seq_len={self.seq_len} has no room for {self.num_queries} queries behind position {self.first_query} "
                f"(2 num_pairs, or min_distance behind the last value). Need {self.first_query + self.num_queries}."
            )
        return self

    @property
    def first_query(self) -> int:
        """Earliest position of a query: behind the pairs, and far enough from every value."""
        return 2 * self.num_pairs - 1 + self.min_distance


class Mqar(RecallConfig, Task):
    """Documents of RecallConfig, each query followed by its value, which is the answer: seq_len + num_queries tokens.

    Ids: id 0 (only without noise) and keys in the lower half, values in the upper.
    """

    kind: Literal["mqar"]

    @property
    def num_ids(self) -> int:
        """Keys and values."""
        return self.vocab_size

    @property
    def answer_ids(self) -> range:
        """The values."""
        return range(self.vocab_size // 2, self.vocab_size)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document."""
        import numpy as np

        from data.tasks.recall_batches import recall_batch

        batch = recall_batch(self, 1, int(rng.integers(2**63)))
        queries, targets = batch.query_positions_bq[0], batch.targets_bt[0]
        tokens = np.insert(batch.tokens_bt[0], queries + 1, targets[queries])
        is_answer = np.insert(np.zeros(self.seq_len, bool), queries + 1, True)
        source = np.full(len(tokens), NO_SOURCE)
        source[is_answer] = batch.value_positions_bq[0]  # all before the first query, so nothing was put before them
        return TaskSequence(tokens, is_answer, source)
