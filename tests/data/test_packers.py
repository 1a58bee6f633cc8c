"""Both ways of packing lose nothing, place every document where they say, and cut only what they may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packers
from data.config import Packing
from data.packers import PACKERS, Block, Encoded

EOD = np.array([0], np.uint16)


def documents(lengths: list[int]) -> list[Encoded]:
    """Documents of different tokens, so that each can be told from its ids alone."""
    ends = np.cumsum(lengths)
    return [
        Encoded(f"d{i}", -1, -1, 0, np.arange(end - length + 1, end + 1, dtype=np.uint32))
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def packed(lengths: list[int], seq_len: int, packing: Packing) -> Block:
    """All blocks as one."""
    blocks = list(PACKERS[packing](iter(documents(lengths)), seq_len, EOD))
    return Block([s for block in blocks for s in block.samples], [d for block in blocks for d in block.documents])


@pytest.fixture(params=["stream", "best_fit"])
def packing(request: pytest.FixtureRequest) -> Packing:
    name: Packing = request.param
    return name


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> None:
    """Several windows, so that their ends are met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packers, "_WINDOW_TOKENS", 100)
        patch.setattr(packers, "_WINDOW_SAMPLES", 3)
        patch.setattr(packers, "_SAMPLES_AT_ONCE", 2)
        yield


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40), packing=st.sampled_from(["stream", "best_fit"]))
def test_each_token_and_end_is_a_target_once_and_where_the_placement_says(
    lengths: list[int], seq_len: int, packing: Packing
) -> None:
    samples, placed = packed(lengths, seq_len, packing)
    targets = np.full(len(samples) * seq_len, -1)
    for number, sample in enumerate(samples):
        assert 2 <= len(sample.tokens) <= seq_len + 1
        targets[number * seq_len : number * seq_len + len(sample.tokens) - 1] = sample.tokens[1:]
        assert sample.doc_starts.tolist() == np.flatnonzero(sample.tokens == 0).tolist()
    assert sorted(document.id for document, _ in placed) == sorted(f"d{i}" for i in range(len(lengths)))
    assert [position for _, position in placed] == sorted(position for _, position in placed)
    for document, position in placed:
        assert targets[position : position + document.num_targets].tolist() == [*document.ids, 0]
        targets[position : position + document.num_targets] = -1
    assert (targets == -1).all()


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40), packing=st.sampled_from(["stream", "best_fit"]))
def test_a_sample_continues_the_one_before_or_begins_a_document(
    lengths: list[int], seq_len: int, packing: Packing
) -> None:
    samples, _ = packed(lengths, seq_len, packing)
    last = 0
    for sample in samples:
        assert sample.tokens[0] == last  # an eod, or the last token of the document that goes on
        last = sample.tokens[-1]
    assert last == 0


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_best_fit_cuts_no_document_that_fits_and_no_two_samples_would_fit_into_one(
    lengths: list[int], seq_len: int
) -> None:
    samples, placed = packed(lengths, seq_len, "best_fit")
    for document, position in placed:
        first, last = position // seq_len, (position + document.num_targets - 1) // seq_len
        assert last - first == (document.num_targets - 1) // seq_len  # as few samples as it can have
    if sum(length + 1 for length in lengths) < 100 and all(length < seq_len for length in lengths):  # one window
        sizes = sorted(len(sample.tokens) - 1 for sample in samples)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > seq_len


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_a_stream_pads_its_last_sample_only(lengths: list[int], seq_len: int) -> None:
    samples, _ = packed(lengths, seq_len, "stream")
    assert len(samples) == -(-sum(length + 1 for length in lengths) // seq_len)
    assert all(len(sample.tokens) == seq_len + 1 for sample in samples[:-1])


def test_best_fit_takes_the_fullest_sample_with_room() -> None:
    samples, placed = packed([6, 2, 4, 3, 12], 8, "best_fit")  # with their ends 7, 3, 5, 4; 13 = 8 and 5
    assert [(document.id, position) for document, position in placed] == [
        ("d0", 0), ("d1", 8), ("d2", 11), ("d3", 16), ("d4", 24),
    ]  # fmt: skip
    assert [len(sample.tokens) - 1 for sample in samples] == [7, 8, 4, 8, 5]
