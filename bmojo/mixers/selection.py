"""Rules that choose which tokens the eidetic memory keeps: one class per rule, in one table (docs/model.md, Selection).

A rule gives each token a log score. The operators innovation_select and innovation_step keep the M highest of what left
the window. A score depends on its own token and on the past alone, so decoding keeps what a whole sequence does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bmojo.fields import ModelFields
from kernels.innovation_select import LOWEST

NEVER = float("-inf")  # the log score of a token that is never kept
LATEST_FIRST = 1.0  # any forgetting time, in tokens, ranks equal scores by position, exactly


class Evidence(NamedTuple):
    """What rules read of tokens, [b, t], or of one token per row, [b]. Only what the rule reads is there."""

    position: Tensor
    doc_ids: Tensor | None = None  # None: one document
    innovation: Tensor | None = None  # e_i
    delta_error: Tensor | None = None
    values: Tensor | None = None  # of the window, [..., h, p]
    wanted: Tensor | None = None  # bool


Reading = Literal["innovation", "delta_error", "values", "wanted", "position"]


class Rule(ABC):
    """A selection rule, and all that is known about it."""

    READS: ClassVar[Reading]
    """The field of Evidence that it needs."""
    DESCRIPTION: ClassVar[str]
    """What it keeps, in a few words."""
    AGES: ClassVar[bool] = True
    """Whether innovation_tau makes its scores fade."""

    @classmethod
    def check(cls, config: ModelFields) -> None:
        """Raise ValueError if fields and rule do not go together."""
        if config.innovation_tau is not None and not cls.AGES:
            raise ValueError(
                f"innovation_tau={config.innovation_tau} has no effect with selection={config.selection}, which keeps "
                "the latest tokens anyway. Remove innovation_tau."
            )
        if config.selection_threshold is not None:
            raise ValueError(
                f"selection_threshold={config.selection_threshold} is read by selection=threshold alone, and selection "
                f"is {config.selection}. Remove selection_threshold, or set selection to threshold."
            )

    @classmethod
    def tau(cls, config: ModelFields) -> float | None:
        """Forgetting time of its scores, in tokens; None: none."""
        return config.innovation_tau

    @classmethod
    def outputs_kept(cls, config: ModelFields) -> int:
        """Past outputs of the SSM that decoding keeps for it."""
        return config.innovation_taps if cls.READS == "innovation" else 0

    @classmethod
    @abstractmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """The log score of each token, float32 at least; NEVER: it is not to be kept. No gradient passes."""


class Innovation(Rule):
    """How badly the past outputs of the SSM predict this one (arXiv:2407.06324)."""

    READS = "innovation"
    DESCRIPTION = "outputs of the SSM that those before predict badly"

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """log e_i. A decoding step's operator computes the same."""
        assert evidence.innovation is not None
        return evidence.innovation.clamp_min(LOWEST).log()


class DeltaError(Rule):
    """The correction that the token makes to the SSM's state: HOLA's score (arXiv:2607.02303)."""

    READS = "delta_error"
    DESCRIPTION = "tokens whose value the SSM's state predicts badly, by how much of it is written"

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """log of the sum over heads of b_t |v_t - a_t S_{t-1} k_t|."""
        assert evidence.delta_error is not None
        return evidence.delta_error.clamp_min(LOWEST).log()


class Threshold(Rule):
    """Tokens that the recurrence predicts badly enough: HAM's rule (arXiv:2603.22325), of them the latest."""

    READS = "innovation"
    DESCRIPTION = "the latest tokens whose innovation exceeds selection_threshold"
    AGES = False

    @classmethod
    def check(cls, config: ModelFields) -> None:
        """See Rule.check. The threshold must be given."""
        threshold = config.selection_threshold
        if threshold is None:
            raise ValueError(
                "selection=threshold needs selection_threshold: the innovation score from which on a token is kept. "
                "Outputs that are predicted no better than by 0 have a score of 1: set selection_threshold to 1.0 for "
                "a start. `bmojo inspect` shows the scores of a trained model."
            )
        super().check(config.model_copy(update={"selection_threshold": None}))

    @classmethod
    def tau(cls, config: ModelFields) -> float | None:
        """See Rule."""
        return LATEST_FIRST

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """0 above the threshold."""
        assert evidence.innovation is not None
        assert config.selection_threshold is not None
        return _marked(evidence.innovation > config.selection_threshold)


class Recency(Rule):
    """The last tokens beyond the window."""

    READS = "position"
    DESCRIPTION = "the latest tokens: a longer window"
    AGES = False

    @classmethod
    def tau(cls, config: ModelFields) -> float | None:
        """See Rule."""
        return LATEST_FIRST

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """The same for all."""
        return torch.zeros_like(evidence.position, dtype=torch.float32)


class ValueNorm(Rule):
    """The length of the token's values, of all heads together."""

    READS = "values"
    DESCRIPTION = "tokens whose values are long"

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """log |v_i|."""
        assert evidence.values is not None
        values = evidence.values.detach().flatten(-2)
        precise = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.linalg.vector_norm(precise, dim=-1).clamp_min(LOWEST).log()


class Random(Rule):
    """A fixed pseudo-random sample of the positions of a document."""

    READS = "position"
    DESCRIPTION = "a fixed random sample of the positions"

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """A number in [0, 1) made of the position."""
        documents = evidence.doc_ids
        return random_rank(evidence.position if documents is None else position_in_document(documents))


class Oracle(Rule):
    """The tokens that the caller marks, and no other: an upper bound."""

    READS = "wanted"
    DESCRIPTION = "the positions that answers of a synthetic task are read off"

    @classmethod
    def log_score(cls, evidence: Evidence, config: ModelFields) -> Tensor:
        """0 where marked. Raises ValueError: nothing is marked."""
        if evidence.wanted is None:
            raise ValueError(
                "selection=oracle keeps the positions that its caller marks, and nothing marks any here: give "
                "wanted_bt to the model's forward. Training reads them from a synthetic source with mark_sources: "
                "true. A text has none, and neither has decoding: there, choose another selection."
            )
        return _marked(evidence.wanted)


RULES: Mapping[str, type[Rule]] = {
    "innovation": Innovation,
    "delta_error": DeltaError,
    "threshold": Threshold,
    "recency": Recency,
    "value_norm": ValueNorm,
    "random": Random,
    "oracle": Oracle,
}
"""The one list of rules: by the names of the field `selection`."""


def _marked(is_kept: Tensor) -> Tensor:
    return torch.where(is_kept, 0.0, NEVER)


def random_rank(position: Tensor) -> Tensor:
    """A fixed pseudo-random rank for each position of a document, for the ablation `selection: random`."""
    mixed = (position.to(torch.int64) + 0x9E3779B9) * 0x85EBCA6B % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 % (1 << 32)
    return ((mixed ^ (mixed >> 13)) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def position_in_document(doc_ids_bt: Tensor) -> Tensor:
    """How many tokens of its own document stand before each position, [b, t]."""
    t = torch.arange(doc_ids_bt.shape[1], device=doc_ids_bt.device)
    first_b1 = torch.ones_like(doc_ids_bt[:, :1], dtype=torch.bool)
    starts = torch.cat([first_b1, doc_ids_bt[:, 1:] != doc_ids_bt[:, :-1]], 1)
    return t - torch.where(starts, t, 0).cummax(1).values
