"""BMojoLM as a transformers model: forward with labels and padding, generate() with a cache of constant size.

Runs on transformers 4.56 to 4.57 and on 5.x, which calls the cache `cache` and wants tied weights as a mapping.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bmojo.hf.cache import BMojoCache
from bmojo.hf.configuration import BMojoConfig
from bmojo.hf.documents import document_ids
from bmojo.model import BMojoLM, float32_names

IGNORED = -100
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
TIED = {"model.head.weight": "model.embedding.weight"}


class BMojoPreTrainedModel(PreTrainedModel):
    """What both classes below share: the weights, and what transformers wants to know of them."""

    config_class = BMojoConfig
    base_model_prefix = ""  # the weights' names begin with `model.` in both
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _is_stateful = True  # the cache cannot be rolled back
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own declarations)
    _tied_weights_keys = TIED if CACHE == "cache" else list(TIED)
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoLM(config.to_model_config())
        self.gradient_checkpointing = False  # transformers sets it, and _gradient_checkpointing_func with it
        # Whatever dtype is loaded, these stay float32. transformers refuses names that a model does not have.
        names = {name.rpartition(".")[2] for name in float32_names(self.model)}
        self._keep_in_fp32_modules_strict = sorted(names)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """See transformers; the config follows, and tied matrices stay one."""
        embedding: torch.nn.Module = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.model.config.replace(vocab_size=self.model.embedding.num_embeddings)
        if self.model.config.tie_embeddings:
            self.model.head.weight = self.model.embedding.weight
        return embedding

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer as in pretraining: matrices decay; SSM parameters, norms and embeddings do not.

        transformers' Trainer would also decay A_log, D, convolution taps and embeddings, and asks no model. So give it
        the optimizer: `Trainer(..., optimizers=(torch.optim.AdamW(model.param_groups(0.1), lr=1e-4), None))`.
        """
        return self.model.param_groups(weight_decay)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: BMojoLM has initialised its own weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The model makes its own cache, whatever cache_implementation says."""
        return False

    def _prepare(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The token ids, and which are no padding (None: all). Raises ValueError without token ids."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"{type(self).__name__} reads token ids: give input_ids, and no inputs_embeds.")
        self.model.checkpoint = (
            self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, tokens].")
        return input_ids, None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()


class BMojoModel(BMojoPreTrainedModel):
    """The model without its output projection: AutoModel gives this one."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Normed features [b, t, d] of whole sequences. Arguments as BMojoForCausalLM's; there is no cache here."""
        tokens_bt, valid_bt = self._prepare(input_ids, inputs_embeds, attention_mask)
        docs_bt = document_ids(tokens_bt, valid_bt, doc_ids, position_ids)
        rows = _Rows(valid_bt)
        tokens_bt = rows.aligned(tokens_bt)
        docs_bt = None if docs_bt is None else rows.aligned(docs_bt)
        if output_hidden_states:
            hidden_btd = self.model(tokens_bt, doc_ids_bt=docs_bt, return_hidden=True).hidden_btd
            hidden = tuple(rows.restored(x_btd) for x_btd in hidden_btd)
            output = BaseModelOutputWithPast(last_hidden_state=hidden[-1], hidden_states=hidden)
        else:
            features_btd = rows.restored(self.model.features(tokens_bt, docs_bt))
            output = BaseModelOutputWithPast(last_hidden_state=features_btd)
        return output if return_dict is not False else cast("tuple[Any, ...]", output.to_tuple())


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """A B'MOJO language model (arXiv:2407.06324) or one of its special cases.

    Differences from other transformers models: the cache is a BMojoCache; one is returned only if use_cache=True asks
    for it; attentions are not returned. Unknown arguments are errors.
    """

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See transformers; without what 4.x adds for caches that need to be told the position."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        cache: BMojoCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        doc_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score tokens, or read them into a cache.

        Args:
            input_ids: token ids [b, t]; with a cache only those it has not read.
            attention_mask: 0 marks padding, on the left or on the right of a row [b, t or all columns so far].
                Results at padded positions mean nothing.
            position_ids: [b or 1, t]; a token whose position does not follow the one before it begins a document, as in
                rows that DataCollatorWithFlattening packs. Positions themselves are relative and not used.
            past_key_values, cache: what an earlier call returned (two names of one argument); it is updated.
            labels: usually input_ids; -100 is ignored. They are shifted here: position t predicts the label of t + 1.
            use_cache: return a cache. A whole sequence then is read once more, in pieces, unless logits_to_keep is 1.
            logits_to_keep: how many of the last positions get logits (0: all), or the indices of those that do.
            doc_ids: integers [b or 1, t], equal within a document. Nothing passes from one document to another.
            seq_idx, cu_seq_lens_q: the same in the forms that collators for packed rows give. The lengths of keys and
                the longest lengths that come with them say nothing more.
            output_hidden_states: return the residual stream after each layer; not with a cache.
        Returns: loss (mean over labels; None without), logits (None in training with labels, where they are never
            materialised), the cache and hidden states.
        Raises: ValueError: padding between tokens; several documents with a cache; what this model does not have.
        """
        if output_attentions:
            raise ValueError("output_attentions is not supported by BMojoForCausalLM; leave it out.")
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("past_key_values and cache are two names of one argument; give one.")
        held = _checked_cache(past_key_values if cache is None else cache)
        tokens_bt, valid_bt = self._prepare(input_ids, inputs_embeds, attention_mask)
        new_valid_bt = None if valid_bt is None else valid_bt[:, -tokens_bt.shape[1] :]
        docs_bt = document_ids(tokens_bt, new_valid_bt, doc_ids, position_ids, seq_idx, cu_seq_lens_q)
        if (held is not None or use_cache) and docs_bt is not None:
            raise ValueError("a cache holds one document per row; score rows of several documents without one.")
        if (held is not None or use_cache) and output_hidden_states:
            raise ValueError("hidden states are not returned with a cache; set use_cache=False.")
        loss = logits = hidden = None
        if held is not None:
            if labels is not None:
                raise ValueError("labels and a cache exclude each other; score the whole sequence at once.")
            logits = self._continue(tokens_bt, held, new_valid_bt, logits_to_keep)
        elif use_cache and _is_last_only(logits_to_keep) and labels is None:
            last_bv, state = self.model.prefill(tokens_bt, valid_bt=valid_bt)
            logits, held = last_bv[:, None], BMojoCache(state, tokens_bt.shape[1])
        else:
            loss, logits, hidden = self._score(
                tokens_bt, valid_bt, docs_bt, labels, logits_to_keep, bool(output_hidden_states)
            )
            if use_cache:
                _, state = self.model.prefill(tokens_bt, valid_bt=valid_bt)
                held = BMojoCache(state, tokens_bt.shape[1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **{CACHE: held})
        return output if return_dict is not False else cast("tuple[Any, ...]", output.to_tuple())

    def _continue(
        self, tokens_bt: Tensor, cache: BMojoCache, valid_bt: Tensor | None, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Read what is new. Logits of several positions are got token by token."""
        num_tokens = tokens_bt.shape[1]
        if valid_bt is not None and not bool(valid_bt.all()):
            if not _is_last_only(logits_to_keep):
                raise ValueError("new tokens with padding give logits of the last token only; set logits_to_keep=1.")
            last_bv, cache.state = self.model.prefill(tokens_bt, cache.state, valid_bt)
            logits = last_bv[:, None]
        elif num_tokens > 1 and _is_last_only(logits_to_keep):
            last_bv, cache.state = self.model.prefill(tokens_bt, cache.state)
            logits = last_bv[:, None]
        else:
            steps = [cache.step(self.model, tokens_bt[:, index]) for index in range(num_tokens)]
            logits = _kept(torch.stack(steps, 1), logits_to_keep)
        cache.num_columns += num_tokens
        return logits

    def _score(
        self,
        tokens_bt: Tensor,
        valid_bt: Tensor | None,
        docs_bt: Tensor | None,
        labels_bt: Tensor | None,
        logits_to_keep: int | Tensor,
        with_hidden: bool,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
        """Loss, logits and hidden states of whole sequences."""
        rows = _Rows(valid_bt)
        targets_bt = None
        if labels_bt is not None:
            ends_bt = torch.zeros_like(labels_bt, dtype=torch.bool)  # what follows is no target
            if valid_bt is not None:
                ends_bt = ~(valid_bt & F.pad(valid_bt[:, 1:], (0, 1)))
            if docs_bt is not None:
                ends_bt = ends_bt | F.pad(docs_bt[:, 1:] != docs_bt[:, :-1], (0, 1))
            targets_bt = rows.aligned(F.pad(labels_bt[:, 1:], (0, 1), value=IGNORED).masked_fill(ends_bt, IGNORED))
        tokens_bt = rows.aligned(tokens_bt)
        docs_bt = None if docs_bt is None else rows.aligned(docs_bt)
        if targets_bt is not None and self.training and not with_hidden:
            return self.model(tokens_bt, targets_bt, docs_bt).loss, None, None
        found = self.model(tokens_bt, doc_ids_bt=docs_bt, return_hidden=with_hidden)
        loss = None
        if targets_bt is not None:
            loss = F.cross_entropy(found.logits_btv.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORED)
        hidden = tuple(rows.restored(x_btd) for x_btd in found.hidden_btd) if with_hidden else None
        return loss, _kept(rows.restored(found.logits_btv), logits_to_keep), hidden


class _Rows:
    """Rows moved to begin at column 0, where they are read as if alone, and back."""

    def __init__(self, valid_bt: Tensor | None) -> None:
        self._shift_b = None if valid_bt is None else _leading_padding(valid_bt)

    def aligned(self, x_bt: Tensor) -> Tensor:
        """x with each row's first token in column 0."""
        return _rolled(x_bt, self._shift_b, -1)

    def restored(self, x_bt: Tensor) -> Tensor:
        return _rolled(x_bt, self._shift_b, 1)


def _checked_cache(cache: object) -> BMojoCache | None:
    if cache is None or isinstance(cache, BMojoCache):
        return cache
    raise ValueError(f"the cache is a {type(cache).__name__}, expected what an earlier call of this model returned.")


def _is_last_only(logits_to_keep: int | Tensor) -> bool:
    return not isinstance(logits_to_keep, Tensor) and logits_to_keep == 1


def _kept(logits_btv: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Logits of the last positions (0: of all), or of the positions whose indices are given."""
    if isinstance(logits_to_keep, Tensor):
        return logits_btv[:, logits_to_keep]
    return logits_btv[:, -logits_to_keep:]


def _leading_padding(valid_bt: Tensor) -> Tensor:
    """Columns of padding before each row's tokens. Raises ValueError if padding is between tokens."""
    first_b = valid_bt.int().argmax(1)
    columns = torch.arange(valid_bt.shape[1], device=valid_bt.device)
    end_b1 = (first_b + valid_bt.sum(1))[:, None]
    inside = bool(((columns < first_b[:, None]) | (columns >= end_b1) | valid_bt).all())
    if not inside or not bool(valid_bt.any(1).all()):
        raise ValueError(
            "attention_mask: padding must be on the left or on the right of at least one token per row, "
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
