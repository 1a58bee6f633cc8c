"""Needles in a haystack as RULER writes them (arXiv:2404.06654, section 3; words and settings as in their code)."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data.tasks.text.example import CountTokens, TextExample, TextTask, choose_others, fill
from data.tasks.text.vocabulary import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    import numpy as np

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_Form = Literal["numbers", "words", "uuids"]


class TextNeedle(TextTask):
    """`One of the special magic numbers for KEY is: VALUE.` among other sentences, and the question for a key's value.

    | RULER's task                   | num_keys | num_values | haystack | keys  | values  |
    |--------------------------------|----------|------------|----------|-------|---------|
    | S-NIAH 1 (pass key)            | 1        | 1          | noise    | words | numbers |
    | MK-NIAH 1 (RULER: in essays)   | 4        | 1          | noise    | words | numbers |
    | MK-NIAH 2 (line retrieval)     | 1        | 1          | needles  | words | numbers |
    | MK-NIAH 3 (key-value pairs)    | 1        | 1          | needles  | uuids | uuids   |
    | MV-NIAH (RULER: in essays)     | 1        | 4          | noise    | words | numbers |

    Two departures. There are no essays here. RULER looks for all values of a key in what the model writes; here they
    are asked for in the order in which they stand, one at random with those before it given.
    """

    kind: Literal["text_needle"]
    num_tokens: int = Field(1024, ge=16, description="Longest prompt, in tokens of the model; it is filled up to that.")
    num_keys: int = Field(1, ge=1, description="Keys whose values are hidden; one of them is asked for.")
    num_values: int = Field(1, ge=1, description="Values of each key.")
    haystack: Literal["noise", "needles"] = Field(
        "noise", description="What is around: a passage that repeats, or needles with other keys."
    )
    keys: _Form = Field("words", description="What keys are: `words` is an adjective and a noun.")
    values: _Form = Field("numbers", description="What values are: `numbers` have seven digits.")

    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample:
        """Draw an example; see TextTask."""
        import numpy as np

        keys = _different(rng, self.keys, self.num_keys)
        values = _different(rng, self.values, self.num_keys * self.num_values)
        decoys = np.random.default_rng(int(rng.integers(2**63)))  # of a haystack of needles
        order = rng.permutation(len(values)).tolist()
        needles = [self._needle(keys[number // self.num_values], values[number]) for number in order]
        places = rng.random(len(needles))  # where each stands, as a share of the haystack
        asked = int(rng.integers(self.num_keys))
        own = [values[number] for number in order if number // self.num_values == asked]
        given = int(rng.integers(self.num_values))
        question = self._question(keys[asked])
        asked_text = question + "".join(f" {value}," for value in own[:given])

        hay: list[str] = []
        hay_values: list[str] = []

        def build(pieces: int) -> str:
            while self.haystack == "needles" and len(hay) < pieces:  # whatever the number, the first ones are the same
                key, value = _random(decoys, self.keys), _random(decoys, self.values)
                if key not in keys and value not in values:
                    hay.append(self._needle(key, value))
                    hay_values.append(value)
            lines = hay[:pieces] if self.haystack == "needles" else [_NOISE] * pieces
            depths = sorted((int(place * (pieces + 1)) for place in places), reverse=True)
            for depth, needle in zip(depths, reversed(needles), strict=True):
                lines.insert(depth, needle)
            return "\n".join([self._opening(), *lines, asked_text])

        pieces = fill(build, count, self.num_tokens, "the needles and the question")
        prompt = build(pieces)
        needle = self._needle(keys[asked], own[given])
        source = prompt.rindex(needle) + len(needle) - 1 - len(own[given])
        in_prompt = [value for value in [*values, *hay_values[:pieces]] if value not in own]
        elsewhere = [value for value in _different(rng, self.values, self.num_choices) if value not in own]
        groups = ([f" {value}" for value in in_prompt], [f" {value}" for value in elsewhere])
        answer = f" {own[given]}"
        return TextExample(prompt, answer, choose_others(rng, answer, groups, self.num_choices - 1), source)

    @property
    def _what(self) -> str:
        return self.values if self.num_values > 1 else self.values[:-1]

    def _opening(self) -> str:
        hidden = "Some special magic {} are" if self.num_values > 1 else "A special magic {} is"
        return (
            f"{hidden.format(self._what)} hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {self._what} afterwards."
        )

    def _question(self, key: str) -> str:
        are, asks = ("are", "are all the") if self.num_values > 1 else ("is", "is the")
        about = f"special magic {self._what} for {key} mentioned in the provided text"
        return f"What {asks} {about}? The {about} {are}"

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."


def _different(rng: np.random.Generator, form: _Form, number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[_random(rng, form)] = None
    return list(found)


def _random(rng: np.random.Generator, form: _Form) -> str:
    if form == "numbers":
        return str(rng.integers(10**6, 10**7))
    if form == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
