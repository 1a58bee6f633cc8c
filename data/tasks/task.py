"""What a synthetic task is: documents of token ids, some of which are answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from base.config import StrictConfig

if TYPE_CHECKING:
    import numpy as np


class TaskSequence(NamedTuple):
    """One document of a task.

    Attributes:
        tokens: (t,) int64.
        is_answer: (t,) bool. An answer follows from the tokens before it; the loss counts nothing else.
    """

    tokens: np.ndarray
    is_answer: np.ndarray


class Task(StrictConfig, ABC):
    """The settings of a task, and its documents. Ids count from 0; the end of a document is not among them."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Share of answers that a guess gets right which knows nothing but which ids answers are drawn from."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document."""


class Parts:
    """A document that is being put together."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._is_answer: list[bool] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: list[int], is_answer: bool = False) -> None:
        """Append tokens, all of them answers or none."""
        self._tokens += tokens
        self._is_answer += [is_answer] * len(tokens)

    def sequence(self) -> TaskSequence:
        """The document."""
        import numpy as np

        return TaskSequence(np.array(self._tokens, np.int64), np.array(self._is_answer, bool))
