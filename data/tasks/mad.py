"""The six tasks of MAD, mechanistic architecture design (arXiv:2403.17844, section 3), as documents to be continued.

Two departures. MAD trains the recall tasks on every token and scores the answers; here the loss counts answers only.
MAD reads the answers of copying, memorization and compression off at positions of their own; here each is a token that
the document goes on with, so a model also sees the right answers before the one it gives.
"""

from __future__ import annotations

from math import perm
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data.tasks.task import NO_SOURCE, Parts, Task, TaskSequence

if TYPE_CHECKING:
    import numpy as np


class InContextRecall(Task):
    """In-context recall: pairs of a key and a value, the keys repeating; a key seen before asks for its value.

        k3 v1 k5 v7 k3 v1 k2 v7 k5 v7        answers: the second v1 and the last v7

    Ids: keys, then values. The value of a key is drawn for each document by itself.
    """

    kind: Literal["in_context_recall"]
    num_keys: int = Field(8, ge=1, description="Different keys.")
    num_values: int = Field(8, ge=1, description="Different values.")
    num_pairs: int = Field(64, ge=2, description="Pairs in a document; the key of the last one has occurred before.")

    @property
    def num_ids(self) -> int:
        """Keys and values."""
        return self.num_keys + self.num_values

    @property
    def answer_ids(self) -> range:
        """The values."""
        return range(self.num_keys, self.num_keys + self.num_values)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of 2 num_pairs tokens."""
        return self._pairs(rng, [False] * self.num_pairs, 0)

    def _pairs(self, rng: np.random.Generator, is_noise: list[bool], num_noise_ids: int) -> TaskSequence:
        values = self.num_keys + rng.integers(0, self.num_values, self.num_keys)
        keys = rng.integers(0, self.num_keys, self.num_pairs)
        value_at: dict[int, int] = {}
        parts = Parts()
        for number, (key, noise) in enumerate(zip(keys.tolist(), is_noise, strict=True)):
            if noise:
                first = self.num_keys + self.num_values
                parts.add(rng.integers(first, first + num_noise_ids, 2).tolist())
                continue
            if number == self.num_pairs - 1:
                key = int(rng.choice(sorted(value_at)))
            parts.add([key])
            value = [int(values[key])]
            value_at[key] = parts.answer(value, [value_at[key]]) if key in value_at else parts.add(value)
        return parts.sequence()


class NoisyRecall(InContextRecall):
    """Noisy in-context recall: the same, with tokens between the pairs that mean nothing. Ids: keys, values, noise."""

    kind: Literal["noisy_recall"]  # type: ignore[assignment]  # narrower than the base's
    num_noise_ids: int = Field(16, ge=1, description="Different tokens of noise.")
    noise_share: float = Field(0.2, ge=0, lt=1, description="Share of the pairs that are noise, on average.")

    @property
    def num_ids(self) -> int:
        """Keys, values and noise."""
        return super().num_ids + self.num_noise_ids

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of 2 num_pairs tokens."""
        is_noise = (rng.random(self.num_pairs) < self.noise_share).tolist()
        is_noise[rng.integers(self.num_pairs - 1)] = is_noise[-1] = False  # one pair, and the one that asks for it
        return self._pairs(rng, is_noise, self.num_noise_ids)


class FuzzyRecall(Task):
    """Fuzzy in-context recall: keys and values are runs of several tokens, of different lengths.

        k3 k1 v5 k2 v7 v1 v2 k3 k1 v5        answer: the last v5

    Ids: those that keys consist of, then those of values; so a key ends where a value begins. A document draws its
    pairs, each of which then recurs; MAD draws keys from all runs there are, of which few recur.
    """

    kind: Literal["fuzzy_recall"]
    num_key_ids: int = Field(7, ge=1, description="Different tokens in keys.")
    num_value_ids: int = Field(7, ge=1, description="Different tokens in values.")
    max_key_tokens: int = Field(3, ge=1, description="Longest key.")
    max_value_tokens: int = Field(3, ge=1, description="Longest value.")
    num_keys: int = Field(8, ge=1, description="Different keys in a document.")
    num_pairs: int = Field(32, ge=2, description="Pairs in a document; more than num_keys, so that some recur.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for tokens, ids in (("max_key_tokens", "num_key_ids"), ("max_value_tokens", "num_value_ids")):
            if getattr(self, tokens) > getattr(self, ids):
                raise ValueError(
                    f"{tokens}={getattr(self, tokens)} is more than {ids}={getattr(self, ids)}, and no token occurs "
                    f"twice in a run. Raise {ids}."
                )
        num_runs = sum(perm(self.num_key_ids, length) for length in range(1, self.max_key_tokens + 1))
        if self.num_keys > num_runs:
            raise ValueError(
                f"num_keys={self.num_keys} is more than the {num_runs} keys of at most {self.max_key_tokens} tokens "
                f"(max_key_tokens) that num_key_ids={self.num_key_ids} allows. Raise num_key_ids."
            )
        if self.num_pairs <= self.num_keys:
            raise ValueError(f"num_pairs={self.num_pairs}: expected more than num_keys={self.num_keys}.")
        return self

    @property
    def num_ids(self) -> int:
        """Those of keys and of values."""
        return self.num_key_ids + self.num_value_ids

    @property
    def answer_ids(self) -> range:
        """The tokens of values."""
        return range(self.num_key_ids, self.num_ids)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document."""
        values: dict[tuple[int, ...], list[int]] = {}
        while len(values) < self.num_keys:
            key = tuple(self._run(rng, self.num_key_ids, self.max_key_tokens))
            value = self._run(rng, self.num_value_ids, self.max_value_tokens)
            values.setdefault(key, [self.num_key_ids + number for number in value])
        keys = list(values)
        value_at: dict[int, int] = {}
        parts = Parts()
        for number in rng.integers(0, len(keys), self.num_pairs).tolist():
            parts.add(list(keys[number]))
            value = values[keys[number]]
            if number in value_at:
                value_at[number] = parts.answer(value, range(value_at[number], value_at[number] + len(value)))
            else:
                value_at[number] = parts.add(value)
        return parts.sequence()

    @staticmethod
    def _run(rng: np.random.Generator, num_ids: int, max_tokens: int) -> list[int]:
        run: list[int] = rng.permutation(num_ids)[: rng.integers(1, max_tokens + 1)].tolist()
        return run


class SelectiveCopying(Task):
    """Selective copying: tokens among blanks, which then come again in their order without the blanks.

        x5 _ _ x1 _ x5 _ copy x5 x1 x5        answers: all behind `copy`

    Ids: the tokens, blank, copy.
    """

    kind: Literal["selective_copying"]
    num_token_ids: int = Field(14, ge=1, description="Different tokens to copy.")
    num_copied: int = Field(16, ge=1, description="Tokens to copy.")
    num_blanks: int = Field(223, ge=0, description="Blanks among them.")

    @property
    def num_ids(self) -> int:
        """The tokens, blank and copy."""
        return self.num_token_ids + 2

    @property
    def answer_ids(self) -> range:
        """The tokens."""
        return range(self.num_token_ids)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of num_blanks + 2 num_copied + 1 tokens."""
        blank, copy = self.num_token_ids, self.num_token_ids + 1
        copied = rng.integers(0, self.num_token_ids, self.num_copied).tolist()
        shown = [blank] * (self.num_copied + self.num_blanks)
        places = sorted(rng.permutation(len(shown))[: self.num_copied].tolist())
        for place, token in zip(places, copied, strict=True):
            shown[place] = token
        parts = Parts()
        parts.add([*shown, copy])
        parts.answer(copied, places)
        return parts.sequence()


class Compression(Task):
    """Compression: random tokens, all of which come again behind one token that ends them.

        x5 x1 x3 end x5 x1 x3        answers: all behind `end`

    MAD lets an MLP read all tokens off the representation of `end`. Here a model must hold them while it writes them.
    Ids: the tokens, `end`.
    """

    kind: Literal["compression"]
    num_token_ids: int = Field(15, ge=1, description="Different tokens.")
    num_tokens: int = Field(31, ge=1, description="Tokens to hold.")

    @property
    def num_ids(self) -> int:
        """The tokens and `end`."""
        return self.num_token_ids + 1

    @property
    def answer_ids(self) -> range:
        """The tokens."""
        return range(self.num_token_ids)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of 2 num_tokens + 1 tokens."""
        tokens = rng.integers(0, self.num_token_ids, self.num_tokens).tolist()
        parts = Parts()
        parts.add([*tokens, self.num_token_ids])
        parts.answer(tokens, range(self.num_tokens))
        return parts.sequence()


class Memorization(Task):
    """Memorization: keys with the value that each has in all documents; only the weights can know it.

        k3 v1 k5 v7 k2 v4        answers: the values

    No key occurs twice in a document (in MAD it may), so that none is answered by recall. Ids: keys, values.
    """

    in_context: ClassVar[bool] = False

    kind: Literal["memorization"]
    num_keys: int = Field(127, ge=1, description="Different keys, and as many values: each key has its own.")
    num_pairs: int = Field(16, ge=1, description="Pairs in a document.")
    map_seed: int = Field(12345, ge=0, description="Seed of which value belongs to which key.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs={self.num_pairs} is more than num_keys={self.num_keys}; lower it.")
        return self

    @property
    def num_ids(self) -> int:
        """Keys and values."""
        return 2 * self.num_keys

    @property
    def answer_ids(self) -> range:
        """The values."""
        return range(self.num_keys, self.num_ids)

    def draw(self, rng: np.random.Generator) -> TaskSequence:
        """Draw a document of 2 num_pairs tokens."""
        import numpy as np

        values = self.num_keys + np.random.default_rng(self.map_seed).permutation(self.num_keys)
        parts = Parts()
        for key in rng.permutation(self.num_keys)[: self.num_pairs].tolist():
            parts.add([key])
            parts.answer([int(values[key])], [NO_SOURCE])
        return parts.sequence()
