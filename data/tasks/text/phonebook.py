"""The phone book of "Repeat After Me" (arXiv:2402.01032, section 4: retrieval by models trained on text)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data.tasks.text.example import CountTokens, TextExample, TextTask, choose_others
from data.tasks.text.vocabulary import FIRST_NAMES, LAST_NAMES

if TYPE_CHECKING:
    import numpy as np


class TextPhonebook(TextTask):
    """A book of names and numbers, two of its entries again to show what is asked, then a third name.

        Ada Stone: 7395162408        answer: the ten digits behind the name that is asked for
        ...

        Leo Fox: 6501774913
        Ines Ward: 9930265871

        Ada Stone:

    As the authors' code has it: ten digits, the first from 6 to 9. Wrong answers are other numbers of the book.
    """

    kind: Literal["text_phonebook"]
    num_entries: int = Field(20, ge=3, le=len(FIRST_NAMES) * len(LAST_NAMES) // 2, description="Entries of the book.")

    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample:
        """Draw an example. `count` is not asked: the length follows from the number of entries."""
        chosen = rng.choice(len(FIRST_NAMES) * len(LAST_NAMES), self.num_entries, replace=False).tolist()
        names = [
            f"{FIRST_NAMES[number % len(FIRST_NAMES)]} {LAST_NAMES[number // len(FIRST_NAMES)]}" for number in chosen
        ]
        numbers: dict[str, None] = {}
        while len(numbers) < self.num_entries:
            numbers[str(rng.integers(6 * 10**9, 10**10))] = None
        entries = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
        first, second, asked = rng.choice(self.num_entries, 3, replace=False).tolist()
        book = "\n".join(entries)
        prompt = f"{book}\n\n{entries[first]}\n{entries[second]}\n\n{names[asked]}:"
        answer = f" {list(numbers)[asked]}"
        others = [f" {number}" for number in numbers]
        source = book.index(entries[asked]) + len(f"{names[asked]}: ")
        return TextExample(prompt, answer, choose_others(rng, answer, [others], self.num_choices - 1), source)
