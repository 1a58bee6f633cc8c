"""The text that a model is evaluated on: the validation split of a `tokenize` stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.records import Split
from pipelines.stages.tokenize.reading import token_split

if TYPE_CHECKING:
    from data.shards import TokenSplit
    from pipelines.engine.stage import StageNode
    from pipelines.stages.tokenize.stage import TokenizeStage

SPLIT: Split = "valid"


def validation_split(tokens: StageNode[TokenizeStage]) -> TokenSplit:
    """The validation split of a finished stage. Nothing is read yet."""
    return token_split(tokens.artifact, SPLIT)
