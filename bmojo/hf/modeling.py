"""BMojoLM as a transformers model: forward with labels and padding, generate() with a cache of constant size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bmojo.hf.cache import BMojoCache
from bmojo.hf.configuration import BMojoConfig
from bmojo.model import SSM_PARAMS, BMojoLM

IGNORED = -100


class BMojoForCausalLM(PreTrainedModel, GenerationMixin):
    """A B'MOJO language model (arXiv:2407.06324) or one of its special cases.

    Differences from other transformers models: `past_key_values` is a BMojoCache; a cache is returned only where
    use_cache=True asks for it; hidden states and attentions are not returned.
    """

    config_class = BMojoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = False
    _is_stateful = True  # the cache cannot be rolled back
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own declarations)
    _tied_weights_keys = ["model.head.weight"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoLM(config.to_model_config())
        # Whatever dtype is loaded, these stay float32. transformers refuses names that a model does not have.
        present = {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}
        self._keep_in_fp32_modules_strict = [name for name in SSM_PARAMS if name in present]
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def _init_weights(self, module: torch.nn.Module) -> None:
        """BMojoLM has initialised its own weights."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score tokens, or read them into a cache.

        Args:
            input_ids: token ids [b, t]; with past_key_values only those it has not read.
            attention_mask: 0 marks padding, on the left or on the right of a row [b, t or all columns so far].
                Results at padded positions mean nothing.
            past_key_values: what an earlier call returned; it is updated.
            labels: usually input_ids; -100 is ignored. They are shifted here: position t predicts the label of t + 1.
            use_cache: return a cache. A whole sequence then is read once more, in pieces, unless logits_to_keep is 1.
            logits_to_keep: how many of the last positions get logits; 0: all.
        Returns: loss (mean over labels; None without), logits (None in training with labels, where they are never
            materialised) and past_key_values.
        Raises: ValueError: padding between tokens; arguments that this model does not have.
        """
        _refuse(kwargs, "inputs_embeds", "output_hidden_states", "output_attentions", "cache_params")
        valid_bt = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        loss = logits = None
        if past_key_values is not None:
            if labels is not None:
                raise ValueError("labels and past_key_values exclude each other; score the whole sequence at once.")
            columns = input_ids.shape[1]
            new_valid_bt = None if valid_bt is None else valid_bt[:, -columns:]
            logits = self._continue(input_ids, past_key_values, new_valid_bt, logits_to_keep)
        elif use_cache and logits_to_keep == 1 and labels is None:
            last_bv, state = self.model.prefill(input_ids, valid_bt=valid_bt)
            logits, past_key_values = last_bv[:, None], BMojoCache(state, input_ids.shape[1])
        else:
            loss, logits = self._score(input_ids, valid_bt, labels, logits_to_keep)
            if use_cache:
                _, state = self.model.prefill(input_ids, valid_bt=valid_bt)
                past_key_values = BMojoCache(state, input_ids.shape[1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if as_dict else cast("tuple[Any, ...]", output.to_tuple())

    def _continue(self, tokens_bt: Tensor, cache: BMojoCache, valid_bt: Tensor | None, logits_to_keep: int) -> Tensor:
        """Read what is new. Logits of several positions are got token by token."""
        num_tokens = tokens_bt.shape[1]
        cache.num_columns += num_tokens
        if valid_bt is not None and not bool(valid_bt.all()):
            last_bv, cache.state = self.model.prefill(tokens_bt, cache.state, valid_bt)
            if logits_to_keep != 1:
                raise ValueError("new tokens with padding give logits of the last token only; set logits_to_keep=1.")
            return last_bv[:, None]
        if num_tokens > 1 and logits_to_keep == 1:
            last_bv, cache.state = self.model.prefill(tokens_bt, cache.state)
            return last_bv[:, None]
        logits = []
        for index in range(num_tokens):
            logits_bv, cache.state = self.model.step(tokens_bt[:, index], cache.state)
            logits.append(logits_bv)
        return torch.stack(logits, 1)[:, -logits_to_keep:]

    def _score(
        self, tokens_bt: Tensor, valid_bt: Tensor | None, labels_bt: Tensor | None, logits_to_keep: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits of whole sequences. Rows are moved to begin at column 0, where they are read as if alone."""
        shift_b = None if valid_bt is None else _leading_padding(valid_bt)
        targets_bt = None
        if labels_bt is not None:
            targets_bt = F.pad(labels_bt[:, 1:], (0, 1), value=IGNORED)
            if valid_bt is not None:
                targets_bt = targets_bt.masked_fill(~(valid_bt & F.pad(valid_bt[:, 1:], (0, 1))), IGNORED)
            targets_bt = _rolled(targets_bt, shift_b, -1)
        tokens_bt = _rolled(tokens_bt, shift_b, -1)
        if targets_bt is not None and self.training:
            return self.model(tokens_bt, targets_bt).loss, None
        logits_btv = self.model(tokens_bt).logits_btv
        loss = None
        if targets_bt is not None:
            loss = F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORED)
        return loss, _rolled(logits_btv, shift_b, 1)[:, -logits_to_keep:]


def _leading_padding(valid_bt: Tensor) -> Tensor:
    """Columns of padding before each row's tokens. Raises ValueError where padding is between tokens."""
    first_b = valid_bt.int().argmax(1)
    columns = torch.arange(valid_bt.shape[1], device=valid_bt.device)
    end_b1 = (first_b + valid_bt.sum(1))[:, None]
    inside = bool(((columns < first_b[:, None]) | (columns >= end_b1) | valid_bt).all())
    if not inside or not bool(valid_bt.any(1).all()):
        raise ValueError(
            "attention_mask: padding must be on the left or on the right of at least one token a row, "
            "not between tokens."
        )
    return first_b


def _rolled(x_bt: Tensor, shift_b: Tensor | None, sign: int) -> Tensor:
    """Each row turned along t by its own shift."""
    if shift_b is None:
        return x_bt
    t = x_bt.shape[1]
    index_bt = (torch.arange(t, device=x_bt.device) - sign * shift_b[:, None]) % t
    return x_bt[torch.arange(x_bt.shape[0], device=x_bt.device)[:, None], index_bt]


def _refuse(kwargs: dict[str, Any], *names: str) -> None:
    for name in names:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name} is not supported by BMojoForCausalLM; leave it out.")
