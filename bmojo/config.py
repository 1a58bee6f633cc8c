"""Definition of a model of the family: one frozen pydantic tree, checked by the mixers of its pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from bmojo.fields import ModelFields
from bmojo.mixers import MIXERS

if TYPE_CHECKING:
    from bmojo.mixers.base import LengthRule


class ModelConfig(ModelFields):
    """A language model of the B'MOJO family. `null` stands for "derived from the other fields"."""

    pattern: str = Field(
        default="bmojo*12",
        description=f"Mixer of each layer, e.g. 'bmojo*12' or '(mamba2,swa)*6'. Mixers: {', '.join(MIXERS)}.",
    )

    def with_vocab_size(self, vocab_size: int) -> ModelConfig:
        """The same model for a tokenizer of `vocab_size` ids. Raises ValueError if another size is already set."""
        if self.vocab_size not in (None, vocab_size):
            raise ValueError(
                f"model.vocab_size is {self.vocab_size} but the tokenizer has {vocab_size} ids; "
                "leave model.vocab_size out, or train the tokenizer to that size."
            )
        return self.replace(vocab_size=vocab_size)

    def replace(self, **changes: Any) -> ModelConfig:
        """A validated copy with some fields changed."""
        return ModelConfig.model_validate({**self.model_dump(), **changes})

    def of_layer(self, layer: int) -> ModelConfig:
        """What a layer, from 0, is built from: the same with its own number of eidetic slots, where there is a list."""
        if isinstance(self.num_eidetic, int):
            return self
        slots = iter(self.num_eidetic)
        by_layer = [next(slots) if MIXERS[name].IS_EIDETIC else 0 for name in self.mixers]
        return self.model_copy(update={"num_eidetic": by_layer[layer]})

    @property
    def length_rules(self) -> tuple[LengthRule, ...]:
        """What the length of training sequences must be a multiple of."""
        rules = (MIXERS[name].length_rule(self) for name in dict.fromkeys(self.mixers))
        return tuple(rule for rule in rules if rule is not None)

    @model_validator(mode="after")
    def _mixers_can_be_built(self) -> ModelConfig:
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(
                    f"pattern {self.pattern!r}: unknown mixer {name!r}; the mixers are {', '.join(MIXERS)}."
                )
        num_eidetic = sum(MIXERS[name].IS_EIDETIC for name in self.mixers)
        if not isinstance(self.num_eidetic, int) and len(self.num_eidetic) != num_eidetic:
            raise ValueError(
                f"num_eidetic has {len(self.num_eidetic)} numbers, {list(self.num_eidetic)}, and the pattern "
                f"{self.pattern!r} has {num_eidetic} layers with an eidetic memory (bmojo). Give one number for each "
                "of these layers, or a single one for all."
            )
        for mixer in dict.fromkeys(MIXERS[name] for name in self.mixers):
            mixer.check(self)
        return self
