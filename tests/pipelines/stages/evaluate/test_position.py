"""Stretches of long documents, and losses by position in them, against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo import BMojoLM, ModelConfig
from data.lineage import Documents, all_documents
from data.shards import read_token_documents
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures.position import PositionConfig
from pipelines.stages.evaluate.measures.position_work import (
    long_windows,
    packed_windows,
    plan_windows,
    position_bins,
    score_by_position,
)
from pipelines.stages.evaluate.validation import validation_split
from tests.pipelines.stages.evaluate.here import measure_here, setting_of
from tests.pipelines.stages.train.training import SEQ_LEN, Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> NativeModel:
    config = ModelConfig(
        pattern="swa*1", d_model=16, num_heads=2, window_size=8, chunk_size=8, vocab_size=VOCAB, ssm_head_dim=8
    )
    model = BMojoLM(config)
    model.init_weights(seed=0)
    return NativeModel(model.eval())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("text"))


def windows(rows: int) -> tuple[np.ndarray, np.ndarray]:
    ids_nt = np.random.default_rng(0).integers(0, VOCAB, (rows, 33))
    return ids_nt[:, :-1], ids_nt[:, 1:]


def test_windows_scored_together_are_scored_as_alone(model: NativeModel) -> None:
    inputs_nt, targets_nt = windows(3)
    together = score_by_position(model, inputs_nt, targets_nt, None, [8, 16, 32])
    for row, by_bin in enumerate(together):
        alone = score_by_position(model, inputs_nt[row : row + 1], targets_nt[row : row + 1], None, [8, 16, 32])
        assert by_bin == pytest.approx(alone[0], rel=1e-5)


def test_loss_by_position_sums_to_the_loss_of_the_window(model: NativeModel) -> None:
    inputs_nt, targets_nt = windows(1)
    (by_bin,) = score_by_position(model, inputs_nt, targets_nt, None, [8, 16, 32])
    with torch.no_grad():
        nll = model.token_losses(torch.from_numpy(inputs_nt), torch.from_numpy(targets_nt))[0].double()
    assert by_bin == pytest.approx([float(part.sum()) for part in (nll[:8], nll[8:16], nll[16:])])


@given(st.integers(1, 600), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_bins_cover_the_context_and_end_at_every_training_length(seq_len: int, multiple: int) -> None:
    bins = position_bins(seq_len, multiple * seq_len)
    assert bins == sorted(set(bins))
    assert bins[-1] == multiple * seq_len
    assert {seq_len * n for n in range(1, multiple + 1)} <= set(bins)


def documents_of(lengths: list[int], padding: list[int]) -> Documents:
    """Documents of these numbers of tokens, each followed by its end and so many places of padding."""
    place_n, num_tokens_n = [], []
    place = 0
    for length, behind in zip(lengths, padding, strict=False):
        place_n.append(place)
        num_tokens_n.append(length)
        place += length + 1 + behind
    return Documents([""] * len(place_n), np.array(place_n, int), np.array(num_tokens_n, int), np.zeros(len(place_n)))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_windows_are_stretches_of_long_documents(lengths: list[int], window_tokens: int) -> None:
    documents = documents_of(lengths, [0] * len(lengths))
    starts = long_windows(documents, window_tokens)
    assert len(starts) == len(set(starts)) == sum(length // window_tokens for length in lengths)
    for start in starts:
        first, last = documents.of_places(np.array([start, start + window_tokens - 1]))
        assert first == last
        assert (start - documents.place_n[first]) % window_tokens == 0
    rounds = [(start - documents.place_n[documents.of_places(start)]) // window_tokens for start in starts]
    assert rounds == sorted(rounds)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.lists(st.sampled_from([0, 0, 0, 1, 9]), min_size=12, max_size=12),
    st.integers(1, 80),
)
@settings(max_examples=100, deadline=None)
def test_packed_windows_hold_no_padding_and_do_not_overlap(
    lengths: list[int], padding: list[int], window_tokens: int
) -> None:
    documents = documents_of(lengths, padding)
    used = set()
    for place, length in zip(documents.place_n.tolist(), lengths, strict=True):
        used |= set(range(place, place + length + 1))
    seen: set[int] = set()
    for start in packed_windows(documents, window_tokens):
        window = set(range(start, start + window_tokens))
        assert window <= used
        assert not window & seen
        seen |= window
    if not any(padding[: len(lengths)]):
        assert len(seen) == len(used) // window_tokens * window_tokens


def test_the_multiple_is_lowered_to_what_documents_allow(tokens: Tokens) -> None:
    setting = setting_of(tokens)
    longest = max(map(len, read_token_documents(validation_split(tokens))))
    found = plan_windows(PositionConfig(multiple=4096), setting)
    assert found is not None
    assert found.num_tokens == longest // SEQ_LEN * SEQ_LEN
    measured = measure_here(PositionConfig(multiple=4096), setting, NativeModel(tiny_model()))
    (curve,) = measured.result.curves
    assert f"No document is long enough for more than {found.num_tokens} tokens." in curve.note
    assert curve.mark is not None
    assert (curve.points[-1].x, curve.mark.x) == (found.num_tokens, SEQ_LEN)


def test_stretches_of_one_document_are_one_unit(tokens: Tokens) -> None:
    setting = setting_of(tokens)
    documents = all_documents(validation_split(tokens))
    config = PositionConfig(multiple=1, max_windows=len(documents.ids) + 3)
    measured = measure_here(config, setting, NativeModel(tiny_model()))
    assert measured.result.unit == "document"
    assert measured.units is not None
    denominators = measured.units.ratios["loss_within"].denominator_n
    assert len(denominators) == measured.result.num_units == int((documents.num_tokens_n >= SEQ_LEN).sum())
    assert sorted(set(denominators.tolist())) == [SEQ_LEN, 2 * SEQ_LEN]
    assert denominators.sum() == config.max_windows * SEQ_LEN


def test_packed_documents_are_kept_apart(tokens: Tokens) -> None:
    """Then a stretch of all documents loses nothing to where it stands: it is the sum of documents alone."""
    model = NativeModel(tiny_model("swa*2"))
    eod = tokens.output.eod_id
    nll: list[float] = []
    for ids in read_token_documents(validation_split(tokens)):
        whole = torch.tensor([eod, *ids.tolist(), eod])[None]
        with torch.no_grad():
            nll += model.token_losses(whole[:, :-1], whole[:, 1:])[0].double().tolist()
    multiple = len(nll) // SEQ_LEN
    measured = measure_here(PositionConfig(multiple=multiple, packed=True), setting_of(tokens), model)
    assert (measured.result.unit, measured.result.num_units) == ("window", 1)
    assert measured.units is not None
    total = sum(ratio.numerator_n.sum() for ratio in measured.units.ratios.values())
    assert total == pytest.approx(sum(nll[: multiple * SEQ_LEN]), rel=1e-5)
