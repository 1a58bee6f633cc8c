"""The work of the measure `in_context`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.lineage import all_documents
from data.shards import read_stretch
from pipelines.stages.evaluate.measures.figures import figure_of, identity_of, point_of
from pipelines.stages.evaluate.measures.measure import Measured, Setting, Units
from pipelines.stages.evaluate.results import Curve, Mark, MeasureResult
from pipelines.stages.evaluate.validation import validation_split
from pipelines.stages.train.device import copy_to
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.measures.in_context import InContextConfig
    from pipelines.stages.evaluate.measures.measure import TaskResult

_BINS_PER_DOUBLING = 4


@dataclass(frozen=True)
class ScoreBeginnings:
    """Score the first tokens of documents. Attributes: starts: places of their first targets; source: their text."""

    source: int
    starts: tuple[int, ...]
    num_tokens: int

    @torch.inference_mode()
    def run(self, host: Host) -> TaskResult:
        """Returns: `nll` in nats of each token of each document, (n, tokens)."""
        split = host.split(self.source)
        stretches = [read_stretch(split, start, start + self.num_tokens) for start in self.starts]
        model = host.model
        inputs_nt, targets_nt = (
            copy_to(model.device, torch.from_numpy(np.stack(arrays))) for arrays in zip(*stretches, strict=True)
        )
        with host.autocast():
            return {"nll": model.token_losses(inputs_nt, targets_nt).float().cpu().numpy()}


def long_documents(config: InContextConfig, setting: Setting) -> list[list[int]]:
    """By text, the places at which documents that are long enough begin: as many of each text, if there are."""
    length = config.length(setting.training_seq_len)
    texts = [all_documents(validation_split(node)) for node in setting.tokens]
    starts = [text.place_n[text.num_tokens_n >= length].tolist() for text in texts]
    in_turn = sorted((rank, source) for source, of_text in enumerate(starts) for rank in range(len(of_text)))
    num_of = np.bincount([source for _, source in in_turn[: config.max_documents]], minlength=len(texts))
    return [of_text[:num] for of_text, num in zip(starts, num_of.tolist(), strict=True)]


def token_bins(num_tokens: int) -> list[int]:
    """Ends of bins of tokens that grow with their distance from the beginning, about four for each doubling."""
    ends = {
        round(2 ** (step / _BINS_PER_DOUBLING)) for step in range(int(np.log2(num_tokens) * _BINS_PER_DOUBLING) + 1)
    }
    return sorted({*ends, num_tokens})


def measured(config: InContextConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
    """The curve, and the score. Units are documents; each weighs the same."""
    name, length = config.called, config.length(setting.training_seq_len)
    if not results:
        notes = (f"Learning in context: no validation document has {length:,} tokens.",) if setting.reads_ids else ()
        return Measured(MeasureResult(name=name, kind="in_context", unit="document", num_units=0, notes=notes))
    nll_nt = np.concatenate([result["nll"] for result in results.values()]).astype(np.float64)
    ones_n = np.ones(len(nll_nt))
    score = Ratio(nll_nt[:, config.late - 1] - nll_nt[:, config.early - 1], ones_n)
    curve = Curve(
        name="loss_by_token",
        title="Loss by the token's number in its document",
        x_label="token of the document",
        y_label="loss (nats per token)",
        points=tuple(
            point_of((begin + end + 1) / 2, Ratio(nll_nt[:, begin:end].mean(1), ones_n))
            for begin, end in pairwise([0, *token_bins(length)])
        ),
        mark=Mark(x=setting.training_seq_len, label="training length") if length > setting.training_seq_len else None,
        log_x=True,
        note=f"Mean over the first {length:,} tokens of {len(nll_nt)} validation documents, each as heavy as another.",
    )
    places = long_documents(config, setting)
    return Measured(
        MeasureResult(
            name=name,
            kind="in_context",
            unit="document",
            num_units=len(nll_nt),
            figures=(figure_of("score", score, unit="nats"),),
            curves=(curve,),
            notes=(
                f"Learning in context: the score is the loss at token {config.late} of a document minus that at token "
                f"{config.early} (arXiv:2209.11895); below 0, the model uses what it has read.",
            ),
        ),
        Units(identity_of([node.output.valid_sha256 for node in setting.tokens], places, length), {"score": score}),
    )
