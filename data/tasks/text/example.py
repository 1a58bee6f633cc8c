"""What a task in words is: prompts, each with one right answer and wrong ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from base.config import StrictConfig
from data.errors import DataError

if TYPE_CHECKING:
    import numpy as np

NOWHERE = -1

CountTokens = Callable[[str], int]
"""Number of tokens of a text."""


class TextExample(NamedTuple):
    """A prompt and its answers.

    Attributes:
        prompt: ends without a blank.
        answer: what must follow, with the blank before it.
        others: wrong answers of the same kind, all different. Those that stand in the prompt come before others.
        source: index in the prompt of the answer's first letter, where it is written last; NOWHERE: an answer must be
            worked out.
    """

    prompt: str
    answer: str
    others: Sequence[str]
    source: int


class TextTask(StrictConfig, ABC):
    """The settings of a task, and its examples."""

    num_choices: int = Field(
        8, ge=2, description="Answers that the likeliest one is taken of, the right one among them."
    )

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample:
        """Draw an example.

        Raises: DataError: the length in tokens that is asked for has no room for the question.
        """


def choose_others(rng: np.random.Generator, answer: str, groups: Sequence[Sequence[str]], number: int) -> list[str]:
    """`number` different wrong answers (or all there are), in random order from the first group, then from the next."""
    chosen: dict[str, None] = {}
    for group in groups:
        for index in rng.permutation(len(group)).tolist():
            if len(chosen) < number and group[index] != answer:
                chosen[group[index]] = None
    return list(chosen)


def fill(build: Callable[[int], str], count: CountTokens, num_tokens: int, what: str) -> int:
    """The greatest number of pieces of filler, about, with which `build` gives a text of at most `num_tokens`.

    Raises: DataError: there is no room even without any.
    """
    empty = count(build(0))
    if empty > num_tokens:
        raise DataError(
            f"num_tokens={num_tokens} has no room for {what}, which takes {empty} tokens of this tokenizer. Raise it."
        )
    probe = 16
    per_piece = max((count(build(probe)) - empty) / probe, 1e-3)
    pieces = int((num_tokens - empty) / per_piece)
    while pieces and (excess := count(build(pieces)) - num_tokens) > 0:
        pieces = max(0, pieces - max(1, int(excess / per_piece)))
    return pieces
