"""Sums of each document against sums done by hand, and the figures that they make."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from data.lineage import Documents, all_documents
from data.shards import TokenBatch, read_token_batches, read_token_documents
from data.tokenizer import load_tokenizer
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures.text import TextConfig, TextMeasure
from pipelines.stages.evaluate.measures.text_work import measured, score_batches
from pipelines.stages.evaluate.validation import validation_split
from tests.pipelines.stages.evaluate.here import measure_here, setting_of
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model

VOCAB = 64
SEQ_LEN = 16
NUM_BYTES = np.arange(VOCAB)


@pytest.fixture(scope="module")
def model() -> NativeModel:
    config = ModelConfig(
        pattern="swa*1",
        d_model=16,
        num_heads=2,
        window_size=8,
        chunk_size=8,
        vocab_size=VOCAB,
        ssm_head_dim=8,
        init_std=0.5,
    )
    model = BMojoLM(config)
    model.init_weights(seed=0)
    return NativeModel(model.eval())


def batch_of(rows: int, seed: int) -> TokenBatch:
    tokens = torch.randint(0, VOCAB, (rows, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[-1, -3:] = -100
    return TokenBatch(tokens[:, :-1], targets, torch.zeros(rows, SEQ_LEN, dtype=torch.int64))


def documents_at(*places: int) -> Documents:
    return Documents([str(place) for place in places], np.array(places), np.zeros(len(places)), np.zeros(len(places)))


@torch.no_grad()
def log_probs(model: NativeModel, batch: TokenBatch) -> torch.Tensor:
    output = model.module(batch.tokens_bt, doc_ids_bt=batch.doc_ids_bt)
    return output.logits_btv.double().log_softmax(-1)


def test_sums_are_those_of_the_targets_of_each_document(model: NativeModel) -> None:
    batches = [batch_of(3, seed=1), batch_of(2, seed=2)]
    # samples 10 to 14: the second document ends in sample 11, the third stands in padding, the last is cut off
    documents = documents_at(7, 165, 180, 205, 220, 5 * SEQ_LEN + 160)
    found = score_batches(model, batches, 10, documents, NUM_BYTES)
    nll, tokens, num_bytes = np.zeros(6), np.zeros(6), np.zeros(6)
    place = 160
    for batch in batches:
        for row_tv, targets_t in zip(log_probs(model, batch), batch.targets_bt.tolist(), strict=True):
            for logp_v, target in zip(row_tv, targets_t, strict=True):
                document = sum(begin <= place for begin in documents.place_n.tolist()) - 1
                if target >= 0:
                    nll[document] -= float(logp_v[target])
                    tokens[document] += 1
                    num_bytes[document] += target
                place += 1
    (scored,) = np.nonzero(tokens)
    assert scored.tolist() == [0, 1, 2, 3, 4] == found["document"].tolist()
    assert found["nll"] == pytest.approx(nll[scored], rel=1e-6)
    assert (found["tokens"] == tokens[scored]).all()
    assert (found["bytes"] == num_bytes[scored]).all()
    assert tokens.sum() == 5 * SEQ_LEN - 6


def test_right_answers_are_those_that_are_the_likeliest_token(model: NativeModel) -> None:
    batch = batch_of(3, seed=1)
    likeliest_bt = log_probs(model, batch).argmax(-1)
    targets_bt = batch.targets_bt.clone()
    targets_bt[0, :5] = likeliest_bt[0, :5]
    targets_bt[1, :5] = (likeliest_bt[1, :5] + 1) % VOCAB
    targets_bt[:, 5:] = -100
    targets_bt[2] = -100
    documents = documents_at(0, 2, SEQ_LEN)
    found = score_batches(model, [batch._replace(targets_bt=targets_bt)], 0, documents, None, counts_right=True)
    assert {name: found[name].tolist() for name in ("document", "right", "tokens", "bytes")} == {
        "document": [0, 1, 2], "right": [2, 3, 0], "tokens": [2, 3, 5], "bytes": [0, 0, 0],
    }  # fmt: skip


def test_answers_are_told_with_documents_kept_apart(model: NativeModel) -> None:
    batch = batch_of(1, seed=3)
    apart = batch._replace(doc_ids_bt=torch.arange(SEQ_LEN)[None] // 4)
    likeliest_bt = log_probs(model, apart).argmax(-1)
    assert (likeliest_bt != log_probs(model, batch).argmax(-1)).any()
    found = score_batches(model, [apart._replace(targets_bt=likeliest_bt)], 0, documents_at(0), None, counts_right=True)
    assert found["right"] == found["tokens"] == SEQ_LEN


def test_parts_add_up_to_the_whole_to_the_last_bit(model: NativeModel) -> None:
    batches = [batch_of(2, seed) for seed in range(4)]
    documents = documents_at(0, 40, 45, 64, 100)
    whole = score_batches(model, batches, 0, documents, NUM_BYTES)
    sums = np.zeros(5)
    for first in (0, 2):  # document 3 begins with the second half
        part = score_batches(model, batches[first : first + 2], 2 * first, documents, NUM_BYTES)
        sums[part["document"]] += part["nll"]
    assert (sums[whole["document"]] == whole["nll"]).all()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


def test_figures_are_those_of_whole_documents(tokens: Tokens) -> None:
    model = NativeModel(tiny_model())
    documents = list(read_token_documents(validation_split(tokens)))
    tokenizer = load_tokenizer(tokens.artifact.local / "tokenizer")
    raw = [tokenizer.decode(ids) for ids in documents]
    num_bytes = sum(map(len, raw))
    bits = sum(8 * len(gzip.compress(text, 9, mtime=0)) for text in raw)
    nll = 0.0
    for batch in read_token_batches(validation_split(tokens), 1):
        with torch.no_grad():
            nll += float(model.token_losses(*batch).double().sum())
    tokens_scored = sum(len(ids) + 1 for ids in documents)
    found = measure_here(TextConfig(), setting_of(tokens, batch_size=2), model)
    figures = {figure.name: figure for figure in found.result.figures}
    assert found.result.num_units == len(documents) == tokens.output.num_valid_documents
    assert figures["loss"].value == pytest.approx(nll / tokens_scored, rel=1e-5)
    assert figures["perplexity"].value == pytest.approx(math.exp(nll / tokens_scored), rel=1e-4)
    assert figures["bits_per_byte"].value == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    assert all(figure.low < figure.value < figure.high for figure in figures.values() if figure.low and figure.high)
    gzipped, untrained = found.result.references
    assert (gzipped.name, gzipped.value) == ("gzip -9", pytest.approx(bits / num_bytes))
    assert untrained.value == pytest.approx(figures["bits_per_byte"].value)  # here it is the same model


def test_only_the_first_tokens_are_scored_if_asked(tokens: Tokens) -> None:
    setting = setting_of(tokens, batch_size=2)
    some = TextConfig(max_tokens=100)
    keys = {task.key for task in TextMeasure().tasks(some, setting)}
    assert keys == {"0-gzip", "0-model-00000000", "0-untrained-00000000"}
    found = measure_here(some, setting, NativeModel(tiny_model()))
    assert found.units is not None
    assert found.units.ratios["loss"].denominator_n.sum() == 128
    documents = all_documents(validation_split(tokens))
    assert found.result.num_units == int((documents.place_n < 128).sum())


def test_several_texts_are_told_together_and_each(tokens: Tokens, tmp_path: Path) -> None:
    other = write_tokens(tmp_path, "other", first=100)
    model = NativeModel(tiny_model())
    both = measure_here(TextConfig(), setting_of(tokens, other), model)
    alone = [measure_here(TextConfig(), setting_of(one), model) for one in (tokens, other)]
    assert both.units is not None
    assert both.result.num_units == sum(one.result.num_units for one in alone)
    assert {figure.name for figure in both.result.figures} == TextMeasure().figure_names(
        TextConfig(), setting_of(tokens, other)
    )
    for name, one in zip(("tokens", "other"), alone, strict=True):
        of_text, whole = both.result.figure(f"loss/{name}"), one.result.figure("loss")
        assert of_text is not None
        assert whole is not None
        assert (of_text.value, of_text.low, of_text.high) == (whole.value, whole.low, whole.high)
        assert not of_text.is_main


def test_units_of_two_models_are_the_same_and_those_of_other_texts_not(tokens: Tokens, tmp_path: Path) -> None:
    other = write_tokens(tmp_path, "other", first=100)
    settings = (setting_of(tokens), setting_of(tokens, batch_size=3), setting_of(other))
    patterns = ("bmojo,mamba2,bmojo_f", "swa*3", "swa*3")
    units = [
        measure_here(TextConfig(), setting, NativeModel(tiny_model(pattern))).units
        for setting, pattern in zip(settings, patterns, strict=True)
    ]
    one, same, another = (of.identity for of in units if of is not None)
    assert one == same != another


def test_nothing_to_score_is_an_error(tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="validation split is empty"):
        measured("text", setting_of(tokens), {}, baselines=())
