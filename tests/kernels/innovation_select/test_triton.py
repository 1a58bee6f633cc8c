"""Triton's scores, selection and decoding step, in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels.innovation_select import innovation_scores, innovation_step, reference_step, triton_path, triton_step
from kernels.operator import use
from tests.kernels.helpers import documents, normal, pairwise
from tests.kernels.innovation_select.steps import (
    SIZES,
    assert_defined,
    assert_slots_stay_within_a_chunk,
    assert_ties_keep_their_order,
    results,
)
from tests.kernels.innovation_select.tied_selections import TiedSelection, select, tied_selections

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}  # y is exact in float32; see README.md


def score(path: str, y: Tensor, weight: Tensor, past: Tensor | None, docs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores, and the weight's gradient for a random cotangent."""
    weight = weight.clone().requires_grad_()
    with use(path):
        error = innovation_scores(y, weight, past, docs)
    (grad,) = torch.autograd.grad(error, weight, normal(*error.shape, dtype=error.dtype, seed=9))
    return error, grad


@pytest.mark.parametrize("past", ["none", "documents", "past"])
@pytest.mark.parametrize(
    ("t", "d", "taps", "per_channel"),
    [(1, 4, 4, True), (3, 5, 4, False), (8, 32, 1, True), (21, 40, 3, True), (70, 33, 2, False)],
)
def test_scores_and_the_gradient_of_the_weights(t, d, taps, per_channel, past):
    y, weight = normal(2, t, d), normal(taps, d if per_channel else 1, seed=1)
    before = normal(2, taps, d, seed=2) if past == "past" else None
    docs = documents(2, t, 0.2) if past == "documents" else None
    got = score("triton", y, weight, before, docs)
    want = score("reference", y.double(), weight.double(), None if before is None else before.double(), docs)
    for value, exact in zip(got, want, strict=True):
        assert value.shape == exact.shape
        assert value.dtype == torch.float32
        assert (value.double() - exact).abs().max() <= TOLERANCE[torch.float32] * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_rows_in_a_slice(dtype):
    y, weight = normal(2, 11, 9, dtype=dtype)[..., 2:8], normal(3, 6, dtype=dtype, seed=1)
    error, grad = score("triton", y, weight, None, None)
    exact, exact_grad = score("reference", y.double(), weight.double(), None, None)
    assert error.dtype == torch.float32
    assert (error.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert grad.dtype == dtype
    assert (grad.double() - exact_grad).abs().max() <= 2**-7 * exact_grad.abs().max()


def test_scores_of_a_document_are_its_own_even_beside_nan():
    y, weight = normal(1, 12, 4), normal(2, 4, seed=1)
    docs = torch.tensor([0] * 5 + [1] * 7)[None]
    with use("triton"):
        want = innovation_scores(y, weight, None, docs)
        y[:, :5] = float("nan")
        assert torch.equal(innovation_scores(y, weight, None, docs)[:, 5:], want[:, 5:])


@pytest.mark.parametrize(
    ("size", "with_documents", "tau"),
    pairwise(
        [(1, 3, 2, 2), (30, 5, 3, 4), (30, 5, 5, 100), (64, 16, 8, 1), (50, 7, 1, 6), (90, 9, 9, 5)],
        [False, True],
        [None, 3.3],
    ),
)
def test_selection_is_the_definition(size, with_documents, tau):
    t, w, c, m = size
    scores = (normal(2, t, dtype=torch.float64) * 3).round()  # rounded: ties are common
    options = {"num_queries": t, "chunk_size": c, "window_size": w, "num_eidetic": m, "tau": tau}
    docs = documents(2, t) if with_documents else None
    position = torch.arange(t).expand(2, -1)
    got, want = (select(path, scores.float(), position, doc_ids_bs=docs, **options) for path in ("triton", "reference"))
    assert got.dtype == torch.int64
    assert torch.equal(got, want)


@pytest.mark.parametrize("tau", [None, 8.0])
def test_ties_go_to_the_earlier_position(tau):
    """With forgetting, scores that fall by 1 / tau a position all rank alike, and 1 / 8 is exact."""
    t = 40
    scores = torch.zeros(1, t) if tau is None else -torch.arange(t)[None] / tau
    options = {"num_queries": t, "chunk_size": 4, "window_size": 6, "num_eidetic": 3, "tau": tau}
    index = select("triton", scores, torch.arange(t)[None], **options)
    assert index[0, -1].tolist() == [0, 1, 2]


@settings(max_examples=15, deadline=None)
@given(case=tied_selections())
def test_ties_under_forgetting_go_to_the_earlier_position(case: TiedSelection) -> None:
    assert case.selected("triton") == case.expected()
    assert case.merged("triton") == case.expected()


@pytest.mark.parametrize("start", [12, 13, 14])
@pytest.mark.parametrize("num_slots", [0, 3])
def test_selection_resumes_from_kept_slots(start, num_slots):
    w, c, m, total = 7, 4, 5, 40
    scores, position = normal(1, total), torch.arange(total).expand(1, -1)
    whole = select("reference", scores, position, num_queries=total, chunk_size=c, window_size=w, num_eidetic=m)
    kept = whole[0, (start - 1) // c, :num_slots]
    past = torch.arange(start - w - c, start)
    count = total - start if start % c == 0 else c - start % c
    rows = torch.cat([kept, past.clamp_min(-1), torch.arange(start, start + count)])
    options = {"num_queries": count, "chunk_size": c, "window_size": w, "num_eidetic": m, "start": start}
    got, want = (
        select(path, scores[:, rows.clamp_min(0)], rows[None], num_slots=num_slots, tau=20.0, **options)
        for path in ("triton", "reference")
    )
    assert torch.equal(got, want)


def test_slots_of_another_document_are_given_up():
    position = torch.tensor([[0, 1, -1, *range(8, 20)]])
    docs = torch.tensor([[0, 1, 1] + [1] * 12])
    options = {"num_queries": 8, "chunk_size": 4, "window_size": 4, "num_eidetic": 4, "start": 12, "num_slots": 3}
    scores = normal(1, 15)
    got, want = (select(path, scores, position, doc_ids_bs=docs, **options) for path in ("triton", "reference"))
    assert torch.equal(got, want)
    assert 1 in got
    assert 0 not in got


def test_no_slots_no_index():
    index = select(
        "triton", normal(1, 9), torch.arange(9)[None], num_queries=9, chunk_size=2, window_size=3, num_eidetic=0
    )
    assert index.shape == (1, 5, 0)


def test_operators_pass_opcheck():
    y, weight, docs = normal(2, 5, 3), normal(2, 3, seed=1).requires_grad_(), documents(2, 5)
    torch.library.opcheck(triton_path.score, (y, weight, None, docs))
    backward = (y, weight.detach(), normal(2, 2, 3), None, normal(2, 5), normal(2, 5).exp(), normal(2, 5))
    torch.library.opcheck(torch.ops.bmojo.innovation_scores_backward.default, backward)
    scores, position = normal(2, 9), torch.arange(9).expand(2, -1).contiguous()
    torch.library.opcheck(triton_path.select, (scores, position, None, 9, 3, 4, 2, 0, 0))


def test_limits_are_named():
    options = {"num_queries": 9, "chunk_size": 3, "window_size": 3, "num_eidetic": 2}
    position = torch.arange(9)[None]
    with pytest.raises(ValueError, match=r"float32 and float64, not torch\.float16"):
        select("triton", normal(1, 9, dtype=torch.float16), position, **options)
    with pytest.raises(ValueError, match="at most 4096 rows at a time, but num_eidetic is 4097"):
        select("triton", normal(1, 9), position, **{**options, "num_eidetic": 4097})
    with use("triton"):
        with pytest.raises(ValueError, match=r"bfloat16, float16 and float32, not torch\.float64"):
            innovation_scores(normal(1, 3, 2, dtype=torch.float64), normal(2, 2))
        with pytest.raises(ValueError, match="at most 16 taps, not 17"):
            innovation_scores(normal(1, 3, 2), normal(17, 2))
    with pytest.raises(ValueError, match="give past_bkd or doc_ids_bt, not both"):
        innovation_scores(normal(1, 3, 2), normal(2, 2), normal(1, 2, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(("positions", "num_slots", "tau", "with_given"), pairwise(*SIZES))
def test_a_step_is_the_definition(positions, num_slots, tau, with_given):
    assert_defined("triton", reference_step.made(positions, (5, 4), (2, 4), num_slots, with_given=with_given, tau=tau))


@pytest.mark.parametrize("tau", [None, 8.0])
def test_ties_go_to_what_was_kept_and_then_to_the_earlier_position(tau):
    assert_ties_keep_their_order("triton", tau)


def test_rows_that_do_not_begin_a_chunk_keep_their_slots():
    assert_slots_stay_within_a_chunk("triton")


def test_triton_takes_the_layout_of_a_decoding_state_and_a_predictor_of_one_weight_per_tap():
    inputs = reference_step.made([16, 17], (5, 4), (2, 4), 5, with_given=False, tau=7.0)
    rings = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_brhp", "v_brhp", "slot_k_bmhp", "slot_v_bmhp")
    }
    wide = torch.cat([inputs.y_bd, inputs.y_bd], 1)[:, : inputs.y_bd.shape[1]]
    assert_defined("triton", inputs._replace(y_bd=wide, weight_kd=normal(3, 1), **rings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_moves_keys_and_outputs_to_the_last_bit(dtype):
    inputs = reference_step.made([16, 17], (5, 4), (2, 4), 5, with_given=False, tau=None)
    low = ("y_bd", "past_bkd", "k_brhp", "v_brhp", "slot_k_bmhp", "slot_v_bmhp")
    inputs = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in low})
    got, want = results("triton", inputs), results("torch", inputs)
    for name in (*low[1:], "slot_position_bm"):
        assert torch.equal(got[name], want[name]), name
    torch.testing.assert_close(got["score"], want["score"], rtol=2e-5, atol=2e-5)


def test_the_step_passes_opcheck():
    torch.library.opcheck(triton_step.step, tuple(reference_step.example()))


def test_limits_of_a_step_are_named():
    inputs = reference_step.example()
    with use("triton"), pytest.raises(ValueError, match=r"float16 and float32, not torch\.float64"):
        innovation_step(*inputs._replace(y_bd=inputs.y_bd.double()))
    with use("triton"), pytest.raises(ValueError, match="at most 16 taps, 4096 slots"):
        innovation_step(*inputs._replace(chunk_size=5000))
    with use("triton"), pytest.raises(ValueError, match="one dtype"):
        innovation_step(*inputs._replace(slot_k_bmhp=inputs.slot_k_bmhp.bfloat16()))
    with use("triton"), pytest.raises(ValueError, match="laid out"):
        innovation_step(*inputs._replace(log_e_br=inputs.log_e_br.t().contiguous().t()))
