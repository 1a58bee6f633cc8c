"""Recall while the facts drift: every phase of a document replaces them all, and only the latest ones count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from data.tasks.task import Parts, Task, TaskSequence

if TYPE_CHECKING:
    import numpy as np


class DriftingRecall(Task):
    """Multi-query associative recall, num_phases times with the same keys, which have other values each time.

        k1 v3 k2 v7 . . k2 v7 . k1 v3 . . k2 v1 k1 v5 . . k1 v5 . . .        answers: values behind the later keys
                        phase 1          | phase 2

    A memory that holds on to what surprised it first answers with values that are no longer right. In each phase come
    the pairs, in random order, then noise, among which keys are asked for. Noise is drawn from the values, so that no
    key occurs but in pairs and questions. Ids: keys in the lower half, values in the upper.
    """

    kind: Literal["drifting_recall"]
    vocab_size: int = Field(64, ge=4, description="Number of ids; the lower half are keys, the upper half values.")
    num_pairs: int = Field(4, ge=1, description="Keys of a document, each with a new value in each phase.")
    num_queries: int = Field(4, ge=1, description="Questions in each phase, each for another key.")
    num_phases: int = Field(4, ge=1, description="Times that all values are replaced, the first included.")
    phase_len: int = Field(40, ge=3, description="Tokens of a phase, without the answers.")
    min_distance: int = Field(1, ge=1, description="Least distance from the last value of a phase to a question.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_pairs > self.vocab_size // 2:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs as many keys, but vocab_size={self.vocab_size} has "
                f"{self.vocab_size // 2}. Set vocab_size to at least {2 * self.num_pairs}."
            )
        if self.num_queries > self.num_pairs:
            raise ValueError(f"num_queries={self.num_queries} is more than num_pairs={self.num_pairs}; lower it.")
        if self.phase_len < (least := self._first_query + self.num_queries):
            raise ValueError(
                f"phase_len={self.phase_len} has no room for {self.num_queries} questions {self.min_distance} tokens "
                f"behind {self.num_pairs} pairs. Set it to at least {least}."
            )
        return self

    @property
    def num_ids(self) -> int:
        """Keys and values."""
        return self.vocab_size

    @property
    def answer_ids(self) -> range:
        """The values."""
        return range(self.vocab_size // 2, self.vocab_size)

    @property
    def _first_query(self) -> int:
        return 2 * self.num_pairs - 1 + self.min_distance

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of num_phases (phase_len + num_queries) tokens."""
        keys = rng.permutation(self.vocab_size // 2)[: self.num_pairs]
        parts = Parts()
        for _ in range(self.num_phases):
            self._add_phase(rng, keys, parts)
        return parts.sequence()

    def _add_phase(self, rng: np.random.Generator, keys: np.ndarray, parts: Parts) -> None:
        ids = self.answer_ids
        value_of = dict(zip(keys.tolist(), rng.integers(ids.start, ids.stop, self.num_pairs).tolist(), strict=True))
        value_at = {key: parts.add([key, value_of[key]]) + 1 for key in rng.permutation(keys).tolist()}
        rest = range(2 * self.num_pairs, self.phase_len)
        noise = dict(zip(rest, rng.integers(ids.start, ids.stop, len(rest)).tolist(), strict=True))
        places = rng.permutation(range(self._first_query, self.phase_len))[: self.num_queries].tolist()
        asked = dict(zip(places, rng.permutation(keys).tolist(), strict=False))
        for place in rest:
            if place in asked:
                key = asked[place]
                parts.add([key])
                parts.answer([value_of[key]], [value_at[key]])
            else:
                parts.add([noise[place]])
