"""What external.py names, loaded: the model and its tokenizer as the measures want them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from base.errors import DamagedError, UserError
from bmojo.hf import import_from_hf
from data.errors import DataError
from data.tokenizer import load_tokenizer
from pipelines.stages.evaluate.external import is_ours
from pipelines.stages.evaluate.language_model import Drawing, LanguageModel, NativeModel, TextTokenizer
from pipelines.stages.train import device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_LOGITS = 1 << 28  # float32 logits at once: 1 GiB
_IGNORED = -100


def load_external_model(folder: Path, on_gpu: bool) -> LanguageModel:
    """The model in a folder, in float32, on the device of this process. Runs no code from there.

    Raises: UserError: transformers does not know the model, or weights are missing. DamagedError: a file is damaged.
    """
    if not is_ours(folder):
        return _transformers_model(folder, on_gpu)
    try:
        module = import_from_hf(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{folder}: {str(error).rstrip('.')}. Export the model again.") from error
    return NativeModel(module.float().to(device.pick(on_gpu)).eval())


def load_external_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer beside the model. Raises as load_external_model."""
    if not is_ours(folder):
        return _transformers_tokenizer(folder)
    try:
        return load_tokenizer(folder)
    except DataError as error:
        raise DamagedError(f"{error} Export the model again.") from error


@dataclass(frozen=True)
class TransformersModel:
    """A causal language model of transformers."""

    module: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """See LanguageModel."""
        return device.device_of(self.module)

    @property
    def vocab_size(self) -> int:
        """See LanguageModel."""
        return int(self.module.get_output_embeddings().weight.shape[0])

    @property
    def max_tokens(self) -> int | None:
        """Its `max_position_embeddings`."""
        limit = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def token_losses(
        self, tokens_bt: Tensor, targets_bt: Tensor, doc_ids_bt: Tensor | None = None, wanted_bt: Tensor | None = None
    ) -> Tensor:
        """See LanguageModel."""
        _refuse_documents(doc_ids_bt)
        rows = max(1, _MAX_LOGITS // (tokens_bt.shape[1] * self.vocab_size))
        losses = []
        for tokens, targets in zip(tokens_bt.split(rows), targets_bt.split(rows), strict=True):
            logits = self._logits(tokens).float()
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none")
            losses.append(nll.view_as(targets))
        return torch.cat(losses)

    def logits_at(
        self,
        tokens_bt: Tensor,
        rows_s: Tensor,
        columns_s: Tensor,
        doc_ids_bt: Tensor | None = None,
        wanted_bt: Tensor | None = None,
    ) -> Tensor:
        """See LanguageModel."""
        _refuse_documents(doc_ids_bt)
        return self._logits(tokens_bt)[rows_s, columns_s]

    @torch.no_grad()
    def generate(
        self,
        prompt_bt: Tensor,
        drawing: Drawing,
        stop_tokens: Collection[int] = (),
        valid_bt: Tensor | None = None,
        num_token_ids: int | None = None,
    ) -> Iterator[Tensor]:
        """See LanguageModel. All tokens are made before the first is given, with torch's own generator, seeded."""
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if drawing.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": drawing.temperature,
                "top_k": drawing.top_k or 0,
                "top_p": drawing.top_p or 1.0,
            }
        stops = sorted(stop_tokens)
        padding_ids = [] if num_token_ids is None else list(range(num_token_ids, self.vocab_size))
        torch.manual_seed(drawing.seed)
        tokens_bt = self.module.generate(
            prompt_bt,
            attention_mask=torch.ones_like(prompt_bt) if valid_bt is None else valid_bt.long(),
            max_new_tokens=drawing.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
            suppress_tokens=padding_ids or None,
            **sampling,
        )
        yield from tokens_bt[:, prompt_bt.shape[1] :].unbind(1)

    def _logits(self, tokens_bt: Tensor) -> Tensor:
        logits_btv: Tensor = self.module(input_ids=tokens_bt, use_cache=False).logits
        return logits_btv


def _refuse_documents(doc_ids_bt: Tensor | None) -> None:
    if doc_ids_bt is not None:
        raise ValueError("a model of transformers reads one document per row.")


class TransformersTokenizer:
    """A tokenizer of transformers, as TextTokenizer has it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Raises: UserError: no token ends a document."""
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"{folder}: its tokenizer has no eos_token, which ends a text. Set it there.")
        self.eod_id = int(tokenizer.eos_token_id)
        self.vocab_size = len(tokenizer)
        with_start, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        starts = [start for start in range(len(with_start)) if with_start[start : start + len(plain)] == plain]
        self.start_ids = tuple(with_start[: starts[0]]) if starts else ()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See TextTokenizer."""
        ids = self._tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        return [np.asarray(of_text, np.int64) for of_text in ids]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See TextTokenizer; bytes that are no UTF-8 come as the character for that."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.encode()


def _transformers_model(folder: Path, on_gpu: bool) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    try:
        module, found = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: transformers cannot load it: {str(error).rstrip('.')}. Expected weights as safetensors of an "
            "architecture that transformers itself knows: code that comes with a model is never run."
        ) from error
    missing = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing or of another shape, among them {missing[0]}; random "
            "numbers would take their place. Fetch or export the model again."
        )
    return TransformersModel(module.to(device.pick(on_gpu)).eval())


def _transformers_tokenizer(folder: Path) -> TransformersTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {str(error).rstrip('.')}.") from error
    return TransformersTokenizer(tokenizer, folder)
