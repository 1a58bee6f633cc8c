"""A model from elsewhere is measured: by its own tokenizer, on the same documents, in the same units."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.errors import UserError
from benchmarks.zero_shot import Pair, export_pair
from bmojo.hf import export_to_hf
from data.shards import read_token_documents
from data.tokenizer import byte_tokenizer, load_tokenizer
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.continuations import Continuation, score_texts
from pipelines.stages.evaluate.external_model import (
    TransformersModel,
    load_external_model,
    load_external_tokenizer,
)
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures import MEASURES
from pipelines.stages.evaluate.measures.position import PositionConfig
from pipelines.stages.evaluate.measures.recall import RecallConfig
from pipelines.stages.evaluate.measures.samples import SamplesConfig
from pipelines.stages.evaluate.measures.text import TextConfig, TextMeasure
from pipelines.stages.evaluate.stage import EvaluateInputs, EvaluateStage
from pipelines.stages.evaluate.subject import ExternalModel
from pipelines.stages.evaluate.validation import validation_split
from tests.pipelines.stages.evaluate.harness.examples import write_examples
from tests.pipelines.stages.evaluate.here import measure_here, setting_of, trained_on
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Pair:
    """A model with the tokenizer of the texts, exported."""
    tokenizer = load_tokenizer(tokens.artifact.local / "tokenizer")
    return export_pair(tiny_model().eval(), tokenizer, tmp_path_factory.mktemp("pair"))


def elsewhere(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"model": {"kind": "hf", "name": str(folder)}, **fields}


@pytest.mark.ci
def test_an_export_scores_as_the_model_that_was_exported(tokens: Tokens, pair: Pair) -> None:
    """Documents here are shorter than the sequences they are packed into, or are cut as in packing."""
    setting = setting_of(tokens, **elsewhere(pair.exported))
    model, tokenizer = load_external_model(pair.exported, False), load_external_tokenizer(pair.exported)
    found = measure_here(TextConfig(), setting, model, tokenizer)
    trained = measure_here(TextConfig(), setting_of(tokens), NativeModel(pair.model))
    assert found.units is not None
    assert trained.units is not None
    assert found.units.identity == trained.units.identity, "the same documents with the same bytes: pairs"
    assert {figure.name for figure in found.result.figures} == TextMeasure().figure_names(TextConfig(), setting)
    ours, theirs = (of.units.ratios["loss"] for of in (trained, found) if of.units is not None)
    assert np.array_equal(ours.denominator_n, theirs.denominator_n)
    assert theirs.numerator_n.sum() == pytest.approx(ours.numerator_n.sum(), rel=0.05)  # other cuts of long documents
    assert [reference.name for reference in found.result.references] == ["gzip -9"]
    assert any("its own tokenizer" in note for note in found.result.notes)


def test_another_tokenizer_gives_bits_per_byte_of_the_same_text(tokens: Tokens) -> None:
    """A model of bytes on texts that were tokenised otherwise: sums by hand."""
    setting = setting_of(tokens, **elsewhere(Path("somewhere")), batch_size=2)
    model, tokenizer = NativeModel(tiny_model()), byte_tokenizer()
    found = measure_here(TextConfig(), setting, model, tokenizer)
    of_texts = load_tokenizer(tokens.artifact.local / "tokenizer")
    raw = [of_texts.decode(ids) for ids in read_token_documents(validation_split(tokens))]
    whole = [Continuation([256], [*text, 256]) for text in raw]
    nats = -sum(score_texts(model, whole, 1 << 20, setting.seq_len))
    figures = {figure.name: figure for figure in found.result.figures}
    assert figures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / sum(map(len, raw)), rel=1e-5)
    assert figures["loss"].value == pytest.approx(nats / sum(len(text) + 1 for text in raw), rel=1e-5)


def test_what_reads_ids_of_the_texts_finds_nothing(tokens: Tokens, pair: Pair) -> None:
    setting = setting_of(tokens, **elsewhere(pair.exported))
    found = measure_here(PositionConfig(), setting, NativeModel(pair.model), pair.tokenizer)
    assert not found.result.figures
    assert not found.result.curves


def test_samples_and_recall_use_its_tokenizer(tokens: Tokens) -> None:
    setting = setting_of(tokens, **elsewhere(Path("somewhere")))
    model, tokenizer = NativeModel(tiny_model()), byte_tokenizer()
    samples = measure_here(SamplesConfig(max_new_tokens=4), setting, model, tokenizer)
    assert len(samples.result.samples) == 1
    suites: Any = {"mqar": {"kind": "mqar", "num_pairs": 2, "num_queries": 1, "seq_len": 6}}
    recall = measure_here(RecallConfig(suites=suites, num_examples=4), setting, model, tokenizer)
    assert recall.result.num_units == 4


def check(tokens: Tokens, trained: Any = None, **fields: Any) -> None:
    config = EvaluateStageConfig.model_validate({"kind": "evaluate", **fields})
    EvaluateStage().check("evaluate", config, EvaluateInputs(trained=trained, tokens=(tokens,)))


def test_there_is_one_model_and_it_reads_text(tokens: Tokens, pair: Pair, tmp_path: Path) -> None:
    check(tokens, **elsewhere(pair.exported))
    with pytest.raises(FieldError, match=r"stages\.evaluate\.needs: no stage of kind train"):
        check(tokens)
    with pytest.raises(FieldError, match=r"stages\.evaluate\.model: a train stage too"):
        check(tokens, trained_on(tmp_path, tokens), **elsewhere(pair.exported))
    with pytest.raises(FieldError, match=r"stages\.evaluate\.step: is of a train stage"):
        check(tokens, **elsewhere(pair.exported, step=3))


def test_its_version_counts_and_what_is_loaded_has_it(pair: Pair, tokens: Tokens, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_to_hf(pair.model, tokens.artifact.local / "tokenizer" / "tokenizer.json", folder)
    config = EvaluateStageConfig.model_validate({"kind": "evaluate", **elsewhere(folder)})
    stage = EvaluateStage()
    content = stage.content_identity(config)
    assert isinstance(content, dict)
    (version,) = content.values()
    assert list(stage.local_paths(config)) == [str(folder)]
    assert config.model is not None
    subject = ExternalModel(config.model, version)
    assert isinstance(subject.load(on_gpu=False), NativeModel)
    assert subject.tokenizer().eod_id == pair.tokenizer.eod_id
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert stage.content_identity(config) != content
    with pytest.raises(UserError, match="its files have changed since the run was planned"):
        subject.load(on_gpu=False)


@pytest.mark.parametrize("kind", [measure.kind for measure in MEASURES])
def test_every_measure_takes_a_model_of_transformers_or_finds_nothing(
    kind: str, tokens: Tokens, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    fields: dict[str, dict[str, Any]] = {
        "recall": {"suites": {"parity": {"kind": "parity"}}, "num_examples": 5},
        "samples": {"max_new_tokens": 4},
        "zero_shot": {"data": str(write_examples(tmp_path)), "tasks": ["piqa", "fda"], "limit": 1, "max_tokens": 64},
    }
    setting = setting_of(tokens, **elsewhere(Path("somewhere")), measures=[{"kind": kind, **fields.get(kind, {})}])
    (config,) = setting.config.measures
    found = measure_here(config, setting, TransformersModel(module.eval()), byte_tokenizer())
    names = {figure.name for figure in found.result.figures}
    known = next(measure for measure in MEASURES if measure.kind == kind).figure_names(config, setting)
    assert known is not None
    assert names <= known
    assert bool(names) == (kind in ("text", "recall", "zero_shot"))
    assert bool(found.result.samples) == (kind == "samples")
