"""The evaluation's figures, against sums done by hand."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo import BMojoLM, ModelConfig
from data.shards import TokenBatch
from pipelines.stages.evaluate.scoring import (
    Score,
    gzip_bits_per_byte,
    long_windows,
    position_bins,
    score_batches,
    score_by_position,
)

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> BMojoLM:
    config = ModelConfig(
        pattern="swa*1", d_model=16, num_heads=2, window_size=8, chunk_size=8, vocab_size=VOCAB, ssm_head_dim=8
    )
    model = BMojoLM(config)
    model.init_weights(seed=0)
    return model.eval()


def batch_of(rows: int, seed: int) -> TokenBatch:
    tokens = torch.randint(0, VOCAB, (rows, 17), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[-1, -3:] = -100
    return TokenBatch(tokens[:, :-1], targets, torch.zeros(rows, 16, dtype=torch.int64))


def test_the_score_is_the_sum_over_targets_and_their_bytes(model: BMojoLM) -> None:
    batch = batch_of(3, seed=1)
    num_bytes = np.arange(VOCAB)
    score = score_batches(model, [batch], num_bytes)
    with torch.no_grad():
        log_p = model(batch.tokens_bt, doc_ids_bt=batch.doc_ids_bt).logits_btv.double().log_softmax(-1)
    kept = batch.targets_bt >= 0
    expected = -log_p[kept].gather(-1, batch.targets_bt[kept][:, None]).sum().item()
    assert score.num_tokens == int(kept.sum()) == 3 * 16 - 3
    assert score.num_bytes == int(batch.targets_bt[kept].sum())
    assert score.nll_nats == pytest.approx(expected, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.num_bytes, rel=1e-6)


def test_right_answers_are_those_that_are_the_likeliest_token(model: BMojoLM) -> None:
    batch = batch_of(3, seed=1)
    with torch.no_grad():
        likeliest_bt = model(batch.tokens_bt, doc_ids_bt=batch.doc_ids_bt).logits_btv.argmax(-1)
    targets_bt = batch.targets_bt.clone()
    targets_bt[0, :5] = likeliest_bt[0, :5]
    targets_bt[1, :5] = (likeliest_bt[1, :5] + 1) % VOCAB
    targets_bt[:, 5:] = -100
    targets_bt[2] = -100
    score = score_batches(model, [batch._replace(targets_bt=targets_bt)], None, counts_right=True)
    assert (score.num_right, score.num_tokens, score.num_bytes) == (5, 10, 0)


def test_parts_add_up_to_the_whole_to_the_last_bit(model: BMojoLM) -> None:
    batches = [batch_of(2, seed) for seed in range(4)]
    num_bytes = np.ones(VOCAB, dtype=np.int64)
    whole = sum(
        (score_batches(model, [batch], num_bytes) for batch in batches[1:]),
        score_batches(model, batches[:1], num_bytes),
    )
    assert whole == score_batches(model, batches, num_bytes)


def test_windows_scored_together_are_scored_as_alone(model: BMojoLM) -> None:
    windows_nt = np.random.default_rng(0).integers(0, VOCAB, (3, 33))
    together = score_by_position(model, windows_nt, [8, 16, 32])
    for window, by_bin in zip(windows_nt, together, strict=True):
        assert by_bin == pytest.approx(score_by_position(model, window[None], [8, 16, 32])[0], rel=1e-5)


def test_nothing_to_score_is_an_error(model: BMojoLM) -> None:
    with pytest.raises(ValueError, match="validation split is empty"):
        score_batches(model, [], np.ones(VOCAB))


def test_loss_by_position_sums_to_the_loss_of_the_window(model: BMojoLM) -> None:
    window = np.random.default_rng(0).integers(0, VOCAB, 33)
    (by_bin,) = score_by_position(model, window[None], [8, 16, 32])
    tokens = torch.from_numpy(window)[None]
    with torch.no_grad():
        nll = model(tokens[:, :-1], tokens[:, 1:], token_losses=True).nll_bt[0].double()
    assert by_bin == pytest.approx([float(part.sum()) for part in (nll[:8], nll[8:16], nll[16:])])


@given(st.integers(1, 600), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_bins_cover_the_context_and_end_at_every_training_length(seq_len: int, multiple: int) -> None:
    bins = position_bins(seq_len, multiple * seq_len)
    assert bins == sorted(set(bins))
    assert bins[-1] == multiple * seq_len
    assert {seq_len * n for n in range(1, multiple + 1)} <= set(bins)


@given(st.lists(st.integers(0, 200), max_size=12), st.integers(1, 40), st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_windows_are_stretches_of_long_documents(lengths: list[int], window_tokens: int, max_windows: int) -> None:
    documents = [np.arange(length) + 1000 * index for index, length in enumerate(lengths)]
    windows = long_windows(documents, window_tokens, max_windows)
    possible = sum(max(length - 1, 0) // window_tokens for length in lengths)
    assert len(windows) == min(possible, max_windows)
    for window in windows:
        assert len(window) == window_tokens + 1
        assert (np.diff(window) == 1).all()
    starts = [int(window[0]) for window in windows]
    assert len(set(starts)) == len(starts)


def test_gzip_compresses_each_document_alone() -> None:
    documents = [b"abc" * 100, b"x"]
    expected = 8 * sum(len(gzip.compress(document, 9, mtime=0)) for document in documents) / 301
    assert gzip_bits_per_byte(documents) == expected
    with pytest.raises(ValueError, match="empty"):
        gzip_bits_per_byte([])


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert Score(1e9, 1, 1).perplexity == math.inf
    assert math.isnan(Score(math.nan, 1, 1).perplexity)
    assert Score(-1e9, 1, 1).perplexity == 0.0
