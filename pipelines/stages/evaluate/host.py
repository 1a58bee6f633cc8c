"""An actor of an `evaluate` stage, and what the work of measures finds in it.

The work is cut the same way however many actors there are, so the figures do not depend on the cluster.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from bmojo import to_bfloat16
from data.lineage import Documents, all_documents
from data.shards import TokenSplit
from data.tokenizer import Tokenizer, load_tokenizer
from pipelines.stages.evaluate.language_model import LanguageModel, NativeModel, TextTokenizer
from pipelines.stages.evaluate.subject import Subject
from pipelines.stages.evaluate.validation import SPLIT
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train import device
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import TaskResult, Work

_REMEDY = "Lower evaluate.batch_size."
_TEXTS = 8  # of which the table of documents is kept


@dataclass(frozen=True)
class Equipment:
    """What an actor is made of.

    Attributes:
        tokens: artifacts of the texts, by their number.
        tokenizer_path: its folder in the first of them; None: what is scored is no text.
        batch_tokens: how many tokens go through the model at once, about.
        num_threads: that it computes with on the CPU.
    """

    subject: Subject
    tokens: tuple[ArtifactDir, ...]
    tokenizer_path: str | None
    batch_tokens: int
    num_threads: float
    on_gpu: bool
    bf16: bool


class Host:
    """An actor. What it needs is fetched, verified and loaded when first asked for, and kept."""

    def __init__(self, equipment: Equipment) -> None:
        self._equipment = equipment
        self._model: LanguageModel | None = None
        self._is_untrained = False
        self._split = lru_cache(_TEXTS)(self._open_split)
        self._documents = lru_cache(_TEXTS)(lambda source: all_documents(self.split(source)))

    def do(self, work: Work) -> TaskResult:
        """Do a piece of a measure's work."""
        torch.set_num_threads(max(1, math.ceil(self._equipment.num_threads)))
        with device.explained_memory(_REMEDY):
            return work.run(self)

    @property
    def model(self) -> LanguageModel:
        """The model that is evaluated, on this actor's device."""
        return self._load(untrained=False)

    @property
    def untrained(self) -> LanguageModel:
        """The same architecture before its first step. One of the two is kept, so ask for it in tasks of Turn.LATE."""
        return self._load(untrained=True)

    @property
    def generator(self) -> LanguageModel:
        """The model to generate with. In bfloat16, if that is the precision, the weights of ours are cast once."""
        model = self.model
        if isinstance(model, NativeModel) and self._equipment.bf16:
            return NativeModel(to_bfloat16(copy.deepcopy(model.module)))
        return model

    @property
    def is_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._equipment.tokenizer_path is not None

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model: its own, or that of the texts."""
        return self._equipment.subject.tokenizer() or self.texts_tokenizer

    @cached_property
    def texts_tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts that it is evaluated on, which are text."""
        path = self._equipment.tokenizer_path
        assert path is not None, "only text has a tokenizer"
        return load_tokenizer(self._equipment.tokens[0].fetch(path))

    @property
    def batch_tokens(self) -> int:
        """How many tokens go through the model at once, about."""
        return self._equipment.batch_tokens

    def split(self, source: int) -> TokenSplit:
        """The validation split of a text, by its number."""
        return self._split(source)

    def documents(self, source: int) -> Documents:
        """The table of that split's documents."""
        return self._documents(source)

    def autocast(self) -> torch.autocast:
        """The precision in which the model computes. Weights are cast once in it."""
        return device.autocast(device.pick(self._equipment.on_gpu), self._equipment.bf16)

    def _open_split(self, source: int) -> TokenSplit:
        return token_split(self._equipment.tokens[source], SPLIT)

    def _load(self, untrained: bool) -> LanguageModel:
        if self._model is None or self._is_untrained != untrained:
            like, self._model = self._model, None
            subject, on_gpu = self._equipment.subject, self._equipment.on_gpu
            self._model = subject.untrained(like, on_gpu) if untrained else subject.load(on_gpu)
            self._is_untrained = untrained
        return self._model
