"""A language model as lm-eval asks for one. Needs lm-eval, which is in the extra `hf`.

It agrees with lm-eval's `hf` type on an exported model: every text begins with what the tokenizer puts before one,
contexts are cut on the left, and what is generated ends before the first stop string. One difference: `hf` scores that
first token too in loglikelihood_rolling, unless it is told add_bos_token=False; here it is context.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from pipelines.stages.evaluate.continuations import Continuation, score_continuations, score_texts
from pipelines.stages.evaluate.language_model import Drawing, LanguageModel, TextTokenizer

MAX_TOKENS = 2048  # as lm-eval takes it for models that state no limit
MAX_NEW_TOKENS = 256  # lm-eval's default
_STEPS_BETWEEN_LOOKS = 8  # while generating: for stop strings


class HarnessLM(TemplateLM):
    """A model with its tokenizer.

    Args:
        batch_tokens: at most about so many tokens go through the model at once.
        max_tokens: longest sequence; what is further back is cut off.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: TextTokenizer,
        batch_tokens: int,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        super().__init__()
        self._model, self._codec, self._batch_tokens = model, tokenizer, batch_tokens
        self._max_tokens = min(max_tokens, model.max_tokens or max_tokens)

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document, and begins one."""
        return self._codec.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text where something must: the last id that begins a document."""
        return [self._codec.eod_id, *self._codec.start_ids][-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind what begins a document unless `add_special_tokens` is False."""
        ids: list[int] = self._codec.encode_batch([string])[0].tolist()
        return ids if add_special_tokens is False else [*self._codec.start_ids, *ids]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in nats."""
        texts = [request.args[0] for request in requests]
        encoded = [Continuation((self.prefix_token_id,), ids.tolist()) for ids in self._codec.encode_batch(texts)]
        return score_texts(self._model, encoded, self._batch_tokens, self._max_tokens)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        written: dict[int, str] = {}
        for settings, numbers in groups.items():
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(json.loads(settings), MAX_NEW_TOKENS))
            contexts = {number: self._context(requests[number].args[0], kwargs["max_gen_toks"]) for number in numbers}
            by_length = sorted(numbers, key=lambda number: -len(contexts[number]))
            while by_length:
                longest = len(contexts[by_length[0]]) + kwargs["max_gen_toks"]
                batch, by_length = self._cut(by_length, longest)
                texts = self._generate([contexts[number] for number in batch], kwargs)
                written |= dict(zip(batch, texts, strict=True))
        return [written[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation(context, ids) for _, context, ids in requests]
        return list(score_continuations(self._model, pairs, self._batch_tokens, self._max_tokens))

    def _context(self, text: str, num_new: int) -> list[int]:
        return self.tok_encode(text)[-max(1, self._max_tokens - num_new) :]

    def _cut(self, numbers: list[int], longest: int) -> tuple[list[int], list[int]]:
        num_rows = max(1, self._batch_tokens // longest)
        return numbers[:num_rows], numbers[num_rows:]

    def _generate(self, contexts: Sequence[list[int]], kwargs: dict[str, Any]) -> list[str]:
        stops = handle_stop_sequences(list(kwargs["until"]), eos=None)
        width = max(map(len, contexts))
        prompt_bt = torch.tensor([[self.eot_token_id] * (width - len(ids)) + ids for ids in contexts])
        valid_bt = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in contexts])
        new_tokens = self._model.generate(
            prompt_bt.to(self._model.device),
            Drawing(
                kwargs["max_gen_toks"],
                temperature=kwargs.get("temperature", 0.0) if kwargs["do_sample"] else 0.0,
                top_k=kwargs.get("top_k"),
                top_p=kwargs.get("top_p"),
            ),
            stop_tokens=(self.eot_token_id,),
            valid_bt=None if bool(valid_bt.all()) else valid_bt.to(self._model.device),
            num_token_ids=self._codec.vocab_size,
        )
        columns: list[torch.Tensor] = []
        texts = [""] * len(contexts)
        for tokens_b in new_tokens:
            columns.append(tokens_b)
            if stops and len(columns) % _STEPS_BETWEEN_LOOKS == 0:
                texts = self._texts(columns)
                if all(any(stop in text for stop in stops) for text in texts):
                    break
        texts = self._texts(columns)
        return [postprocess_generated_text(text, stops, think_end_token=None) for text in texts]

    def _texts(self, columns: Sequence[torch.Tensor]) -> list[str]:
        rows = torch.stack(list(columns), 1).tolist()
        ended = [row[: row.index(self.eot_token_id)] if self.eot_token_id in row else row for row in rows]
        return [self._codec.decode(row).decode("utf-8", errors="replace") for row in ended]
