"""A task of token ids, written in words: documents that show how it goes, then one that ends before an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.tasks.task import Task
from data.tasks.text.example import CountTokens, TextExample, choose_others

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rendered:
    """Documents in the words of a task, one per line; the model is asked for one of the last one's answers.

    Wrong answers are those of the document first, so that knowing what occurs in it is not enough.

    Attributes:
        num_shown: whole documents before the one that is asked about.
        num_choices: answers that the likeliest one is taken of.
    """

    task: Task
    num_shown: int
    num_choices: int

    def __post_init__(self) -> None:
        if not self.task.in_context:
            raise ValueError("answers that only training could teach cannot be asked of a model of text.")

    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample:
        """Draw an example. `count` is not asked: the length follows from the task's settings."""
        import numpy as np

        words = np.array(self.task.words())
        shown = [" ".join(words[self.task.draw(rng).tokens]) for _ in range(self.num_shown)]
        tokens, is_answer, sources = self.task.draw(rng)
        at = int(rng.choice(np.flatnonzero(is_answer)))
        past = words[tokens[:at]]
        prompt = "\n".join([*shown, " ".join(past)])
        source = len(prompt) - len(" ".join(past)) + sum(len(word) + 1 for word in past[: sources[at]])
        answer_words = words[np.array(self.task.answer_ids)].tolist()
        in_document = set(past.tolist())
        groups = (
            [f" {word}" for word in answer_words if word in in_document],
            [f" {word}" for word in answer_words if word not in in_document],
        )
        answer = f" {words[tokens[at]]}"
        return TextExample(prompt, answer, choose_others(rng, answer, groups, self.num_choices - 1), source)
