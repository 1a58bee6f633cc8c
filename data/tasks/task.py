"""What a synthetic task is: documents of token ids, some of which are answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from base.config import StrictConfig
from data.tasks.words import made_up_words

if TYPE_CHECKING:
    import numpy as np

NO_SOURCE = -1


class TaskSequence(NamedTuple):
    """One document of a task.

    Attributes:
        tokens: (t,) int64.
        is_answer: (t,) bool. An answer follows from the tokens before it; the loss counts nothing else.
        source: (t,) int64. Where an answer is read off: the last place where it is written behind what asks for it. Of
            a state that all tokens lead to, the first of them. NO_SOURCE: only the weights can know it; no answer.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    source: np.ndarray


class Task(StrictConfig, ABC):
    """The settings of a task, and its documents. Ids count from 0; the end of a document is not among them."""

    in_context: ClassVar[bool] = True  # answers follow from the document alone, so a model need not be trained on it

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def answer_ids(self) -> range:
        """The ids that answers are drawn from, each as often as any other."""

    @property
    def chance(self) -> float:
        """Share of answers that a guess gets right which knows nothing but which ids answers are drawn from."""
        return 1 / len(self.answer_ids)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document."""

    def words(self) -> list[str]:
        """A word for each id, all different, for models of text."""
        return made_up_words(self.num_ids)


class Parts:
    """A document that is being put together."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._is_answer: list[bool] = []
        self._source: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: list[int]) -> int:
        """Append tokens that are no answers. Returns the position of the first one."""
        return self._add(tokens, False, [NO_SOURCE] * len(tokens))

    def answer(self, tokens: list[int], source: Sequence[int]) -> int:
        """Append answers, which are read off at these positions. Returns the position of the first one."""
        return self._add(tokens, True, source)

    def sequence(self) -> TaskSequence:
        """The document."""
        import numpy as np

        return TaskSequence(
            np.array(self._tokens, np.int64), np.array(self._is_answer, bool), np.array(self._source, np.int64)
        )

    def _add(self, tokens: list[int], is_answer: bool, source: Sequence[int]) -> int:
        assert len(tokens) == len(source), "a source for each token"
        first = len(self)
        self._tokens += tokens
        self._is_answer += [is_answer] * len(tokens)
        self._source += source
        return first
