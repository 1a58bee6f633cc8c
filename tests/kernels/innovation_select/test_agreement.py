"""Scores and selection on the plain paths: the definition, ties, resumption from kept slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels.innovation_select import innovation_scores, innovation_select
from kernels.operator import use
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, documents, normal, pairwise, run
from tests.kernels.innovation_select.tied_selections import TiedSelection, select, tied_selections

pytestmark = pytest.mark.usefixtures("nan_memory")

PLAIN_PATHS = ("reference", "torch", "cpp", "static")
PASTS = ["none", "documents", "past"]
SIZES = [(1, 4, 4, True), (3, 5, 4, False), (8, 32, 1, True), (21, 40, 3, True), (70, 33, 2, False), (2, 70, 6, True)]


@pytest.mark.parametrize(
    ("path", "size", "past", "dtype"),
    [(path, *row) for path in ("torch", "cpp", "static") for row in pairwise(SIZES, PASTS, DTYPES)],
)
def test_scores_match_the_reference(path, size, past, dtype):
    t, d, taps, per_channel = size
    y = normal(2, t, d + 3, dtype=dtype)[..., 1 : d + 1]
    weight = normal(taps, d if per_channel else 1, dtype=torch.float64, seed=1)
    before = normal(2, taps, d, dtype=torch.float64, seed=2) if past == "past" else None
    docs = documents(2, t, 0.2) if past == "documents" else None
    with use(path):
        got = innovation_scores(y, weight, before, docs)
    with use("reference"):
        want = innovation_scores(y.double(), weight, before, docs)
    assert got.dtype == dtype
    assert_close({"scores": got}, {"scores": want}, TOLERANCE)


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("path", ["torch", "cpp", "static"])
def test_a_trained_predictor_gets_its_gradient(path, past):
    y, before = normal(2, 40, 5, dtype=torch.float64), normal(2, 2, 5, dtype=torch.float64, seed=2)
    docs = documents(2, 40) if past == "documents" else None

    def scores(weight: Tensor) -> Tensor:
        return innovation_scores(y, weight, before if past == "past" else None, docs)

    weight = {"weight": normal(2, 5, dtype=torch.float64, seed=1)}
    assert_close(run(path, scores, weight), run("reference", scores, weight), TOLERANCE)


@pytest.mark.parametrize(
    ("size", "with_documents", "tau"),
    pairwise([(1, 3, 2, 2), (30, 5, 3, 4), (30, 5, 5, 100), (64, 16, 8, 1), (50, 7, 1, 6)], [False, True], [None, 3.0]),
)
def test_selection_is_the_definition(size, with_documents, tau):
    t, w, c, m = size
    scores = (normal(2, t, dtype=torch.float64) * 3).round()  # rounded: ties are common
    position = torch.arange(t).expand(2, -1)
    options = {"num_queries": t, "chunk_size": c, "window_size": w, "num_eidetic": m, "tau": tau}
    docs = documents(2, t) if with_documents else None
    reference, *others = [select(path, scores, position, doc_ids_bs=docs, **options) for path in PLAIN_PATHS]
    assert all(torch.equal(reference, got) for got in others)


@pytest.mark.parametrize("path", PLAIN_PATHS)
@settings(max_examples=40, deadline=None)
@given(case=tied_selections())
def test_ties_under_forgetting_go_to_the_earlier_position(path: str, case: TiedSelection) -> None:
    assert case.selected(path) == case.expected()


@pytest.mark.parametrize("path", PLAIN_PATHS)
@settings(max_examples=40, deadline=None)
@given(case=tied_selections())
def test_ties_under_forgetting_go_to_the_earlier_position_when_merging(path: str, case: TiedSelection) -> None:
    assert case.merged(path) == case.expected()


@pytest.mark.parametrize("path", PLAIN_PATHS)
def test_a_tie_whose_ages_are_no_floats_goes_to_the_earlier_position(path: str) -> None:
    """log e 3 at position 3 and 1 at position 9 rank alike if tau is 3, though no chunk's ages / 3 are floats."""
    scores = torch.zeros(1, 40, dtype=torch.float64)
    scores[0, 3], scores[0, 9] = 3.0, 1.0
    options = {"num_queries": 40, "chunk_size": 4, "window_size": 10, "num_eidetic": 1, "tau": 3.0}
    index = select(path, scores, torch.arange(40)[None], **options)
    assert index[0, 3:7, 0].tolist() == [2, 3, 3, 14]  # 9 is a candidate in the third of these


@pytest.mark.parametrize("start", [12, 13])
def test_selection_resumes_from_kept_slots(start):
    w, c, m, total = 7, 4, 3, 40
    scores, position = normal(1, total, dtype=torch.float64), torch.arange(total).expand(1, -1)
    options = {"chunk_size": c, "window_size": w, "num_eidetic": m}
    whole = innovation_select(scores, position, num_queries=total, **options)
    kept = whole[:, (start - 1) // c]
    past = torch.arange(start - w - c, start).clamp_min(-1)
    count = total - start if start % c == 0 else c - start % c
    rows = torch.cat([kept[0], past, torch.arange(start, start + count)])
    row_scores = scores[:, rows.clamp_min(0)]
    for path in PLAIN_PATHS:
        got = select(path, row_scores, rows[None], num_queries=count, start=start, num_slots=m, **options)
        positions = torch.where(got >= 0, rows[got.clamp_min(0)], -1)
        first = start // c
        assert torch.equal(positions, whole[:, first : first + positions.shape[1]])


def test_queries_over_a_chunk_boundary_are_refused():
    with pytest.raises(ValueError, match="cross a chunk boundary"):
        innovation_select(
            torch.zeros(1, 5), torch.arange(5)[None], num_queries=5, chunk_size=4, window_size=4, num_eidetic=1, start=2
        )
