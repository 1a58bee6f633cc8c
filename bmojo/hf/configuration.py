"""A ModelConfig as transformers wants it: one attribute per field, beside transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from bmojo.config import ModelConfig


class BMojoConfig(PretrainedConfig):
    """Configuration of BMojoForCausalLM. The fields are those of bmojo.config.ModelConfig, which checks them.

    Fields may be changed after loading if the weights still fit: num_eidetic, or window_size for another trade of
    memory for speed.
    """

    model_type = "bmojo"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own declaration)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in ModelConfig.model_fields}
        tied = kwargs.pop("tie_word_embeddings", None)
        if tied is not None:
            given.setdefault("tie_embeddings", tied)
        # transformers asks for the defaults, whose mixer's file an exported folder may lack: nothing to check then.
        model = ModelConfig.model_validate(given) if given else ModelConfig.model_construct()
        for name, value in model.model_dump().items():
            setattr(self, name, value)
        self.use_cache = kwargs.pop("use_cache", True)  # by generate(); forward() makes a cache if it is told to
        super().__init__(tie_word_embeddings=model.tie_embeddings, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return self.to_model_config().num_layers

    def to_model_config(self) -> ModelConfig:
        """The model these attributes describe. Raises pydantic.ValidationError if they do not fit together."""
        return ModelConfig.model_validate({name: getattr(self, name) for name in ModelConfig.model_fields})
