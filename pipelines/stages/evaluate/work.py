"""The work of an `evaluate` stage: what one actor holds, and the pieces that it is asked for.

The work is cut the same way however many actors there are, so the figures do not depend on the cluster.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from bmojo import BMojoLM, ModelConfig, to_bfloat16
from data.records import Split
from data.shards import TokenSplit, read_token_batches, read_token_documents
from data.tokenizer import Tokenizer, load_tokenizer
from pipelines.stages.evaluate import scoring
from pipelines.stages.evaluate.sampling import Drawing, continue_texts
from pipelines.stages.models import load_model
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train import device

if TYPE_CHECKING:
    from pipelines.storage.artifact import ArtifactDir

SPLIT: Split = "valid"
_REMEDY = "Lower evaluate.batch_size."


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, on what and how.

    Attributes:
        tokenizer_path: None: what is scored is no text.
        is_task: whether only answers are scored.
        num_threads: that an actor computes with on the CPU.
    """

    trained: ArtifactDir
    model_path: str
    tokens: ArtifactDir
    tokenizer_path: str | None
    is_task: bool
    num_threads: float
    on_gpu: bool
    bf16: bool

    def split(self) -> TokenSplit:
        """What is scored."""
        return token_split(self.tokens, SPLIT)


class Evaluator:
    """An actor. What it needs is fetched, verified and loaded when first asked for, and kept."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._model: BMojoLM | None = None
        self._is_untrained = False

    def score_batches(self, untrained: bool, batch_size: int, start: int, stop: int) -> scoring.Score:
        """Score the batches `start` to `stop`, exclusive, of the validation split."""
        batches = read_token_batches(self._split, batch_size, start=start * batch_size, max_samples=stop * batch_size)
        token_num_bytes = None if self._subject.tokenizer_path is None else self._tokenizer.token_num_bytes
        model = self._load(untrained)
        with device.explained_memory(_REMEDY), device.autocast(device.device_of(model), self._subject.bf16):
            return scoring.score_batches(model, batches, token_num_bytes, counts_right=self._subject.is_task)

    def score_windows(self, windows_nt: np.ndarray, bin_ends: tuple[int, ...]) -> np.ndarray:
        """Sum of the losses in each bin of positions, of each stretch of text, (n, bins)."""
        model = self._load()
        with device.explained_memory(_REMEDY), device.autocast(device.device_of(model), self._subject.bf16):
            return scoring.score_by_position(model, windows_nt, bin_ends)

    def continue_texts(self, prompts: Sequence[str], drawing: Drawing) -> list[str]:
        """The model's continuations of prompts."""
        model = to_bfloat16(copy.deepcopy(self._load())) if self._subject.bf16 else self._load()
        return continue_texts(model, self._tokenizer, prompts, drawing)

    def gzip_bits_per_byte(self) -> float:
        """gzip -9 on the documents of the validation split. Needs no model."""
        return scoring.gzip_bits_per_byte(self._tokenizer.decode(ids) for ids in read_token_documents(self._split))

    @cached_property
    def _split(self) -> TokenSplit:
        return self._subject.split()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards, which are of text."""
        path = self._subject.tokenizer_path
        assert path is not None, "only text has a tokenizer"
        return load_tokenizer(self._subject.tokens.fetch(path))

    def _load(self, untrained: bool = False) -> BMojoLM:
        """The model on this actor's device, or the same architecture before its first step; one of them is kept."""
        if self._model is None or self._is_untrained != untrained:
            torch.set_num_threads(max(1, math.ceil(self._subject.num_threads)))
            config = None if self._model is None else self._model.config
            self._model = None  # before the other one needs its memory
            self._model = self._make(untrained, config).to(device.pick(self._subject.on_gpu)).eval()
            self._is_untrained = untrained
        return self._model

    def _make(self, untrained: bool, config: ModelConfig | None) -> BMojoLM:
        """On the CPU. `config`: the architecture, if it is known."""
        if untrained and config is not None:
            return BMojoLM(config)  # its weights are those of seed 0
        model = load_model(self._subject.trained, self._subject.model_path)
        if untrained:
            model.init_weights(seed=0)
        return model
