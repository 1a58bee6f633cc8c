"""State tracking: one answer at the end that depends on every token before it and, for S5, on their order.

"The Illusion of State in State-Space Models" (arXiv:2404.08819, section 6) asks for the state after each token. Here it
is asked for once, behind `=`, since a document that told the state would leave one step to do; documents of all
lengths from min_length on are mixed instead.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from data.tasks.task import Parts, Task, TaskSequence

if TYPE_CHECKING:
    import numpy as np


class _StateTracking(Task):
    min_length: int = Field(1, ge=1, description="Least number of tokens before `=`.")
    max_length: int = Field(32, ge=1, description="Greatest number of tokens before `=`.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is more than max_length={self.max_length}; lower it.")
        return self

    def _inputs(self, rng: np.random.Generator, num_ids: int) -> list[int]:
        inputs: list[int] = rng.integers(0, num_ids, rng.integers(self.min_length, self.max_length + 1)).tolist()
        return inputs


def _with_answer(inputs: list[int], equals: int, answer: int) -> TaskSequence:
    parts = Parts()
    parts.add([*inputs, equals])
    parts.answer([answer], [0])
    return parts.sequence()


class Parity(_StateTracking):
    """Parity: bits, `=`, and whether the number of ones is odd (arXiv:1906.06755, section 5). Ids: 0, 1, `=`."""

    kind: Literal["parity"]

    @property
    def num_ids(self) -> int:
        """0, 1 and `=`."""
        return 3

    @property
    def answer_ids(self) -> range:
        """Even or odd."""
        return range(2)

    def words(self) -> list[str]:
        """Digits."""
        return ["0", "1", "="]

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of at most max_length + 2 tokens."""
        bits = self._inputs(rng, 2)
        return _with_answer(bits, 2, sum(bits) % 2)


class S5(_StateTracking):
    """The word problem of S5: permutations of five things, `=`, and the permutation that all of them in turn make.

    Ids: the 120 permutations in lexicographic order, `=`. Permutation p puts what stood at place p[i] at place i.
    """

    kind: Literal["s5"]

    @property
    def num_ids(self) -> int:
        """The permutations and `=`."""
        return len(_PERMUTATIONS) + 1

    @property
    def answer_ids(self) -> range:
        """The permutations."""
        return range(len(_PERMUTATIONS))

    def words(self) -> list[str]:
        """What each permutation makes of `abcde`."""
        return ["".join("abcde"[place] for place in places) for places in _PERMUTATIONS] + ["="]

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of at most max_length + 2 tokens."""
        inputs = self._inputs(rng, len(_PERMUTATIONS))
        places = _PERMUTATIONS[0]
        for number in inputs:
            places = tuple(places[place] for place in _PERMUTATIONS[number])
        return _with_answer(inputs, len(_PERMUTATIONS), _PERMUTATIONS.index(places))


_PERMUTATIONS: list[tuple[int, ...]] = list(permutations(range(5)))
