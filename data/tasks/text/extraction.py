"""Extraction from reports, after FDA: reports to a regulator (arXiv:2304.09433) that models continue with a field's
value (arXiv:2402.18668). These reports are made up: fields with values among sentences of other matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data.tasks.text.example import CountTokens, TextExample, TextTask, choose_others, fill
from data.tasks.text.vocabulary import ADJECTIVES, NOUNS
from data.tasks.words import made_up_words

if TYPE_CHECKING:
    import numpy as np

FIELDS = (
    "Device name", "Manufacturer", "Trade name", "Applicant", "Contact person", "Predicate device", "Common name",
    "Reviewer", "Product line", "Trademark holder", "Distributor", "Test laboratory", "Supplier", "Site of production",
    "Brand", "Registrant",
)  # fmt: skip
_FILLER = (
    "The {} {} was examined by the committee, which found the {} {} in good order.",
    "Results for the {} {} were compared with those of the {} {} and did not differ.",
    "No report mentions a {} {} that was used together with a {} {}.",
    "A {} {} was kept beside the {} {} at room temperature.",
)
_NAMES = made_up_words(2000)


class Extraction(TextTask):
    """A report with fields, one per line, among filler; then the name of one field, whose value must follow.

    Values are two made-up names, so that nothing but the report tells them. Wrong answers are values of other fields.
    """

    kind: Literal["extraction"]
    num_tokens: int = Field(1024, ge=16, description="Longest prompt, in tokens of the model; it is filled up to that.")
    num_fields: int = Field(8, ge=2, le=len(FIELDS), description="Fields of a report.")

    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample:
        """Draw an example; see TextTask."""
        import numpy as np

        fields = [FIELDS[number] for number in rng.permutation(len(FIELDS))[: self.num_fields].tolist()]
        names = rng.choice(len(_NAMES), 2 * self.num_fields, replace=False).tolist()
        values = [
            f"{_NAMES[first].capitalize()} {_NAMES[second].capitalize()}"
            for first, second in zip(names[::2], names[1::2], strict=True)
        ]
        places = np.sort(rng.random(self.num_fields))
        filler_rng = np.random.default_rng(int(rng.integers(2**63)))
        asked = int(rng.integers(self.num_fields))

        filler: list[str] = []

        def build(pieces: int) -> str:
            while len(filler) < pieces:  # whatever the number, the first ones are the same
                filler.append(_filler(filler_rng))
            lines = filler[:pieces]
            for number in reversed(range(self.num_fields)):
                lines.insert(int(places[number] * (pieces + 1)), f"{fields[number]}: {values[number]}")
            return "\n".join([*lines, "", f"{fields[asked]}:"])

        prompt = build(fill(build, count, self.num_tokens, "the fields and the question"))
        line = f"{fields[asked]}: {values[asked]}"
        source = prompt.index(line) + len(f"{fields[asked]}: ")
        answer = f" {values[asked]}"
        others = choose_others(rng, answer, [[f" {value}" for value in values]], self.num_choices - 1)
        return TextExample(prompt, answer, others, source)


def _filler(rng: np.random.Generator) -> str:
    template, *words = rng.integers(0, (len(_FILLER), *(2 * (len(ADJECTIVES), len(NOUNS))))).tolist()
    names = [(ADJECTIVES, NOUNS)[place % 2][word] for place, word in enumerate(words)]
    return _FILLER[template].format(*names)
