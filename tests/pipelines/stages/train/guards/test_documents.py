"""The document canary on the real model: silent where documents are kept apart, and it names the layer that leaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import UserError
from data.shards import TokenBatch, TokenSplit
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.data import TokenSource
from pipelines.stages.train.guards.documents import DocumentCanary
from pipelines.stages.train.guards.incidents import Incidents
from pipelines.stages.train.layout import INCIDENTS
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.train.plain_trainer import PlainTrainer
from tests.pipelines.stages.train.trainer_contract import initial_model
from tests.pipelines.stages.train.training import SEQ_LEN, Tokens

pytestmark = pytest.mark.usefixtures("single_process")

KINDS = "mamba2,bmojo,bmojo_f,swa,attention,mamba,gated_deltanet,kda,mamba3"


class Canary:
    """A canary over a model with one layer of each kind, and counts of its forward passes."""

    def __init__(self, config: TrainStageConfig, tokens: Tokens, folder: Path) -> None:
        self.trainer, self.folder, self.num_forwards = PlainTrainer(initial_model(config), config), folder, 0
        self.trainer.model.register_forward_hook(self._count)
        self.stream = TokenStream(
            [TokenSplit(tokens.artifact.local, "train")],
            micro_batch_size=8, global_batch_size=8, order=StreamOrder(), worker=Worker(),
        )  # fmt: skip
        sources = [TokenSource("tokens", tokens.artifact, 1, has_validation=False)]
        self.canary = DocumentCanary(self.trainer, config, Incidents(ArtifactDir.at(folder), sources, self.stream))

    def _count(self, *given: Any) -> None:
        self.num_forwards += 1


@pytest.fixture
def canary(
    train_config: Callable[..., TrainStageConfig], tiny_model: dict[str, Any], tokens: Tokens, tmp_path: Path
) -> Canary:
    model = tiny_model | {"pattern": f"({KINDS})*1", "vocab_size": 320}
    return Canary(train_config(model=model, check_documents_every_steps=10), tokens, tmp_path / "train-0")


def batch(num_documents: int) -> TokenBatch:
    tokens_bt = torch.randint(0, 300, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    doc_ids_bt = torch.zeros_like(tokens_bt)
    doc_ids_bt[1] = torch.arange(SEQ_LEN) * num_documents // SEQ_LEN
    return TokenBatch(tokens_bt, tokens_bt.roll(-1, dims=1), doc_ids_bt)


def test_no_layer_of_ours_passes_anything_between_documents(canary: Canary) -> None:
    """Exactly: the canary has no tolerance where equal forward passes give equal bits."""
    for number, num_documents in enumerate((2, 3, 5)):
        canary.canary.check(1 + 10 * number, [batch(num_documents)], is_look=True)
    assert canary.num_forwards == 2 * 3


@pytest.mark.parametrize("layer", range(len(KINDS.split(","))))
def test_a_layer_that_ignores_documents_is_named(canary: Canary, layer: int) -> None:
    canary.trainer.model.blocks[layer].register_forward_pre_hook(
        lambda _, given: (given[0], replace(given[1], doc_ids_bt=None), *given[2:])
    )
    kind = KINDS.split(",")[layer]
    with pytest.raises(UserError, match=rf"step 1: .* by up to .* first seen after layer {layer} \({kind}\)"):
        canary.canary.check(1, [batch(1), batch(2)], is_look=True)
    (line,) = (canary.folder / INCIDENTS).read_text().splitlines()
    incident = json.loads(line)
    assert (incident["kind"], incident["step"]) == ("documents", 1)
    assert float(incident["largest"]) > 0


def test_it_waits_for_a_batch_with_two_documents_and_looks_again_after_so_many_steps(canary: Canary) -> None:
    def forwards(step: int, num_documents: int, is_look: bool = True) -> int:
        before = canary.num_forwards
        canary.canary.check(step, [batch(num_documents)], is_look)
        return canary.num_forwards - before

    assert [forwards(1, 1), forwards(2, 2, is_look=False), forwards(3, 2), forwards(4, 2)] == [0, 0, 2, 0]
    assert [forwards(12, 2), forwards(13, 2), forwards(14, 2)] == [0, 2, 0]
