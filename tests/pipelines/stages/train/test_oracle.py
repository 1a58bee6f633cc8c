"""Training with selection=oracle: what it needs is asked for before the run, and reaches the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.config import SyntheticSource, TokenizeFields
from data.shards import TokenSplit, read_token_batches
from data.tasks.mqar import Mqar
from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures.recall_work import answers_in_ids
from tests.bmojo.model_family import build, small_config
from tests.data.here import tokenize_here

SUITE = Path(__file__).parents[4] / "configs" / "reproduce" / "selection.yaml"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["tokens.source.mark_sources=false"], r"mark_sources.*is false, and train-oracle-0 trains with"),
        (
            ["tokens.source={kind: tokens, paths: [x.npy], vocab_size: 9}"],
            "reads a source of kind tokens, in which nothing marks such",
        ),
    ],
)
def test_tokens_without_marks_are_refused_before_the_run(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_pipeline(SUITE, [*overrides, "train.foreach.seed=[0]"])


def test_evaluation_tells_an_oracle_where_answers_are_read_off(tmp_path: Path) -> None:
    """By the shards of a split and by documents: the same logits as with the marks of the documents themselves."""
    task = Mqar(kind="mqar", num_pairs=4, num_queries=3, seq_len=24)
    source = SyntheticSource(kind="synthetic", task=task, num_documents=20, mark_sources=True)
    fields = TokenizeFields(source=source, seq_len=28, validation_fraction=0, packing="best_fit")
    tokenize_here(None, fields, tmp_path)
    (batch, *_) = read_token_batches(TokenSplit(tmp_path, "train"), 4, world_size=1)
    model = build(small_config(pattern="bmojo", selection="oracle", vocab_size=65))
    unlike = model(batch.tokens_bt, doc_ids_bt=batch.doc_ids_bt, wanted_bt=torch.zeros_like(batch.wanted_bt))
    seen = model(batch.tokens_bt, doc_ids_bt=batch.doc_ids_bt, wanted_bt=batch.wanted_bt)
    assert not torch.equal(seen.logits_btv, unlike.logits_btv)
    native = NativeModel(model)
    losses_bt = native.token_losses(*batch)
    assert torch.equal(losses_bt[batch.targets_bt < 0], torch.zeros_like(losses_bt[batch.targets_bt < 0]))

    class Recorder(NativeModel):
        marks: torch.Tensor

        def logits_at(self, tokens_bt, rows_s, columns_s, doc_ids_bt=None, wanted_bt=None):  # type: ignore[no-untyped-def]  # a stand-in
            self.marks = wanted_bt
            return super().logits_at(tokens_bt, rows_s, columns_s, doc_ids_bt, wanted_bt)

    import numpy as np

    recorder, documents = Recorder(model), [task.draw(np.random.default_rng(0))]
    answers_in_ids(recorder, documents, eod_id=64, chance=0.1, batch_tokens=1000)
    sources = documents[0].source[documents[0].source >= 0]
    assert sorted(recorder.marks[0].nonzero()[:, 0].tolist()) == sorted((sources + 1).tolist())
