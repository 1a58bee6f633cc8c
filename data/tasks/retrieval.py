"""Retrieval from a long context: a needle in a haystack, and a phone book."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from data.tasks.task import Parts, Task, TaskSequence
from data.tasks.words import made_up_words

if TYPE_CHECKING:
    import numpy as np


class Needle(Task):
    """Needles in a haystack (RULER, arXiv:2404.06654, section 3): keys with their values in noise, one asked for.

        . . k7 v2 v9 . . . . k1 v5 v5 . . k7 v2 v9        answers: v2 v9 at the end

    RULER's single needle has one key and one value, its multi-key task four keys, its multi-value task one key with
    four values. A key with several values stands before each of them; asked for, all follow in the order in which they
    were written (RULER takes them in any order). Values are drawn from the tokens of the noise. Ids: noise, keys.
    """

    kind: Literal["needle"]
    num_noise_ids: int = Field(64, ge=1, description="Different tokens of noise, and of values.")
    num_key_ids: int = Field(64, ge=1, description="Different keys.")
    num_needles: int = Field(1, ge=1, description="Keys with their values in a document; one of them is asked for.")
    num_values: int = Field(1, ge=1, description="Values of each key, at places of their own.")
    value_tokens: int = Field(2, ge=1, description="Tokens of a value.")
    noise_tokens: int = Field(256, ge=0, description="Tokens of noise in a document.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_needles > self.num_key_ids:
            raise ValueError(f"num_needles={self.num_needles} is more than num_key_ids={self.num_key_ids}; lower it.")
        return self

    @property
    def num_ids(self) -> int:
        """Noise and keys."""
        return self.num_noise_ids + self.num_key_ids

    @property
    def answer_ids(self) -> range:
        """The tokens of values."""
        return range(self.num_noise_ids)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document.

        Of noise_tokens + num_needles num_values (value_tokens + 1) + 1 + num_values value_tokens tokens.
        """
        keys = (self.num_noise_ids + rng.permutation(self.num_key_ids)[: self.num_needles]).tolist()
        num_written = self.num_needles * self.num_values
        values = rng.integers(0, self.num_noise_ids, (num_written, self.value_tokens)).tolist()
        noise = rng.integers(0, self.num_noise_ids, self.noise_tokens).tolist()
        places = sorted(rng.integers(0, self.noise_tokens + 1, num_written).tolist())
        asked = keys[int(rng.integers(self.num_needles))]
        written = rng.permutation(keys * self.num_values).tolist() if self.num_values > 1 else keys
        parts = Parts()
        values_at: list[int] = []  # of the key that is asked for
        answers: list[int] = []
        for (start, end), key, value in zip(pairwise([0, *places]), written, values, strict=True):
            parts.add([*noise[start:end], key])
            first = parts.add(value)
            if key == asked:
                values_at += range(first, first + len(value))
                answers += value
        parts.add(noise[places[-1] :])
        parts.add([asked])
        parts.answer(answers, values_at)
        return parts.sequence()


class Phonebook(Task):
    """Phone-book lookup (arXiv:2402.01032, section 4): names with their numbers, then one of the names.

        a b : 4 7 ; a c : 0 7 ; b b : 3 3 ; ? a c : 0 7        answers: the digits at the end

    Ids: the ten digits, `:`, `;`, `?`, the tokens of names.
    """

    kind: Literal["phonebook"]
    num_entries: int = Field(16, ge=1, description="Names with their numbers.")
    num_name_ids: int = Field(26, ge=1, description="Different tokens of names.")
    name_tokens: int = Field(3, ge=1, le=16, description="Tokens of a name.")
    number_tokens: int = Field(4, ge=1, description="Digits of a number.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_entries > self.num_name_ids**self.name_tokens:
            raise ValueError(
                f"num_entries={self.num_entries} is more than the {self.num_name_ids**self.name_tokens} names of "
                f"name_tokens={self.name_tokens} tokens. Raise name_tokens or num_name_ids."
            )
        return self

    @property
    def num_ids(self) -> int:
        """Digits, signs and the tokens of names."""
        return _FIRST_NAME + self.num_name_ids

    @property
    def answer_ids(self) -> range:
        """The digits."""
        return range(_NUM_DIGITS)

    def words(self) -> list[str]:
        """Digits, signs and made-up names."""
        return [*map(str, range(_NUM_DIGITS)), ":", ";", "?", *made_up_words(self.num_name_ids)]

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of (num_entries + 1) (name_tokens + number_tokens + 2) tokens."""
        names: dict[tuple[int, ...], None] = {}
        while len(names) < self.num_entries:
            names[tuple(rng.integers(_FIRST_NAME, self.num_ids, self.name_tokens).tolist())] = None
        numbers = rng.integers(0, _NUM_DIGITS, (self.num_entries, self.number_tokens)).tolist()
        parts = Parts()
        numbers_at = []
        for name, number in zip(names, numbers, strict=True):
            parts.add([*name, _COLON])
            numbers_at.append(parts.add(number))
            parts.add([_SEMICOLON])
        asked = int(rng.integers(self.num_entries))
        parts.add([_QUESTION, *list(names)[asked], _COLON])
        parts.answer(numbers[asked], range(numbers_at[asked], numbers_at[asked] + self.number_tokens))
        return parts.sequence()


_NUM_DIGITS = 10
_COLON, _SEMICOLON, _QUESTION, _FIRST_NAME = 10, 11, 12, 13
