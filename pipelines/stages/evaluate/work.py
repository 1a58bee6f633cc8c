"""The tasks of an `evaluate` stage.

The work is cut the same way however many tasks run side by side, so the figures do not depend on the cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bmojo import BMojoLM
from data.records import Split
from data.shards import TokenSplit, read_token_batches, read_token_documents
from data.tokenizer import Tokenizer, load_tokenizer
from pipelines.stages.evaluate import scoring
from pipelines.stages.evaluate.sampling import continue_text
from pipelines.stages.models import load_model
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train import device

if TYPE_CHECKING:
    from pipelines.engine.stage import Resources
    from pipelines.stages.evaluate.config import SampleConfig
    from pipelines.storage.artifact import ArtifactDir

SPLIT: Split = "valid"


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and on what.

    Attributes:
        tokenizer_path: None: what is scored is no text.
        is_task: whether only answers are scored.
        untrained: the same architecture before its first step.
    """

    trained: ArtifactDir
    model_path: str
    tokens: ArtifactDir
    tokenizer_path: str | None
    is_task: bool
    resources: Resources
    untrained: bool = False

    def split(self) -> TokenSplit:
        """What is scored."""
        return token_split(self.tokens, SPLIT)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards, which are of text."""
        assert self.tokenizer_path is not None, "only text has a tokenizer"
        return load_tokenizer(self.tokens.fetch(self.tokenizer_path))

    def model(self) -> BMojoLM:
        """The model on this worker's device; loaded once a process."""
        key = (self.trained.url, self.untrained)
        if key not in _loaded:
            torch.set_num_threads(max(1, math.ceil(self.resources.cpus_per_worker)))
            model = load_model(self.trained, self.model_path)
            if self.untrained:
                model.init_weights(seed=0)
            _loaded.clear()
            _loaded[key] = model.to(device.pick(on_gpu=self.resources.gpus_per_worker > 0)).eval()
        return _loaded[key]


_loaded: dict[tuple[str, bool], BMojoLM] = {}


def score_batches(subject: Subject, batch_size: int, start: int, stop: int) -> scoring.Score:
    """Score the batches `start` to `stop`, exclusive, of the validation split."""
    batches = read_token_batches(subject.split(), batch_size, start=start * batch_size, max_samples=stop * batch_size)
    token_num_bytes = None if subject.tokenizer_path is None else subject.tokenizer().token_num_bytes
    return scoring.score_batches(subject.model(), batches, token_num_bytes, counts_right=subject.is_task)


def score_window(subject: Subject, window: np.ndarray, bin_ends: tuple[int, ...]) -> np.ndarray:
    """Sum of the losses in each bin of positions of one stretch of text."""
    return scoring.score_by_position(subject.model(), window, bin_ends)


def sample_text(subject: Subject, prompt: str, sample: SampleConfig) -> str:
    """The model's continuation of a prompt."""
    pieces = continue_text(
        subject.model(),
        subject.tokenizer(),
        prompt,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=sample.seed,
    )
    return "".join(pieces)


def gzip_bits_per_byte(subject: Subject) -> float:
    """gzip -9 on the documents of the validation split."""
    tokenizer = subject.tokenizer()
    return scoring.gzip_bits_per_byte(tokenizer.decode(ids) for ids in read_token_documents(subject.split()))
