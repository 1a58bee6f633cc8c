"""Every operator's fast path against its reference: outputs, final states and all gradients, in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d
from kernels.innovation_select import innovation_scores, innovation_select
from kernels.memory_attention import attention_mass, memory_attention
from kernels.selective_scan import selective_scan
from kernels.ssd_scan import ssd_scan
from tests.kernels.tied_selections import TiedSelection, tied_selections

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest value; see each README.md
DTYPES = list(TOLERANCE)
PLAIN_PATHS = ("reference", "torch", "cpp")


def assert_agree(
    op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor | None], **options: object
) -> None:
    """Run all paths, with a random cotangent, and compare everything with the reference."""
    results = []
    for path in PLAIN_PATHS:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
        with dispatch.use(path):
            out = op(*leaves, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in outputs if x.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in wanted]
        floating = [x for x in leaves if x is not None and x.is_floating_point()]
        grads = torch.autograd.grad(wanted, floating, cotangents, allow_unused=True)
        results.append([*outputs, *grads])
    reference, *others = results
    for path, result in zip(PLAIN_PATHS[1:], others, strict=True):
        for want, got in zip(reference, result, strict=True):
            if want is None or got is None:
                assert want is None or want.abs().max() == 0 or got is not None
                continue
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            assert (got - want).abs().max() <= TOLERANCE[want.dtype] * max(1.0, want.abs().max().item()), path


def documents(batch: int, t: int) -> Tensor:
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < 0.1
    return starts.cumsum(1)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize(("t", "h", "g", "n"), [(1, 2, 1, 3), (63, 3, 3, 4), (64, 2, 1, 4), (150, 4, 2, 5)])
def test_ssd_scan(t, h, g, n, with_initial, with_documents, dtype):
    inputs = [
        normal(2, t, h, 3, dtype=dtype),
        normal(2, t, h, dtype=dtype, seed=1).exp() * 0.1,
        -normal(h, dtype=dtype).exp(),
        normal(2, t, g, n, dtype=dtype, seed=2),
        normal(2, t, g, n, dtype=dtype, seed=3),
        normal(h, dtype=dtype, seed=4),
        normal(2, h, 3, n, dtype=dtype, seed=5) if with_initial else None,
        documents(2, t) if with_documents else None,
    ]
    assert_agree(ssd_scan, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("t", [1, 15, 16, 530])
def test_selective_scan(t, with_initial, with_documents, dtype):
    inputs = [
        normal(2, t, 3, dtype=dtype),
        normal(2, t, 3, dtype=dtype, seed=1).exp() * 0.1,
        -normal(3, 4, dtype=dtype).exp(),
        normal(2, t, 4, dtype=dtype, seed=2),
        normal(2, t, 4, dtype=dtype, seed=3),
        normal(3, dtype=dtype, seed=4),
        normal(2, 3, 4, dtype=dtype, seed=5) if with_initial else None,
        documents(2, t) if with_documents else None,
    ]
    assert_agree(selective_scan, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", ["none", "documents", "initial"])
@pytest.mark.parametrize(("t", "width"), [(1, 4), (2, 4), (3, 2), (40, 3), (41, 4)])
def test_causal_conv1d(t, width, past, dtype):
    initial = normal(2, width - 1, 5, dtype=dtype, seed=2)
    inputs = [normal(2, t, 5, dtype=dtype), normal(5, width, dtype=dtype, seed=1)]

    def conv(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(
            x, weight, initial if past == "initial" else None, documents(2, t) if past == "documents" else None
        )

    assert_agree(conv, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("t", "w", "c", "m"), [(1, 3, 2, 2), (7, 9, 4, 3), (40, 8, 8, 5), (300, 60, 7, 3), (290, 140, 140, 9)]
)
def test_memory_attention(t, w, c, m, kv_heads, with_documents, dtype):
    q, far_q = normal(2, t, 4, 6, dtype=dtype), normal(2, t, 4, 6, dtype=dtype, seed=1)
    rows = (t, t, max(t - w, 1), max(t - w, 1), t)
    keys_values = [normal(2, n, kv_heads, 6, dtype=dtype, seed=2 + i) for i, n in enumerate(rows)]
    chunks = -(-t // c)
    index = torch.stack(
        [torch.randperm(max(t, m), generator=torch.Generator().manual_seed(i))[:m] for i in range(2 * chunks)]
    )
    index = torch.where(index < t, index, -1).view(2, chunks, m)
    docs = documents(2, t) if with_documents else None

    def attention(q: Tensor, far_q: Tensor, k: Tensor, v: Tensor, fk: Tensor, fv: Tensor, raw_k: Tensor) -> Tensor:
        return memory_attention(
            q, k, v, (fk, fv), (far_q, raw_k, v, index), window_size=w, chunk_size=c, doc_ids_bt=docs
        )

    assert_agree(attention, [q, far_q, *keys_values])


@pytest.mark.parametrize("num_past", [0, 3, 20])
def test_memory_attention_reads_only_the_past_there_is(num_past):
    t, w = 11, 6
    q, k, v = normal(1, t, 2, 4, dtype=torch.float64), *normal(2, 1, t + w, 2, 4, dtype=torch.float64, seed=1)
    fk, fv = normal(2, 1, t + w, 2, 4, dtype=torch.float64, seed=2)
    assert_agree(
        lambda *x: memory_attention(x[0], x[1], x[2], (x[3], x[4]), window_size=w, num_past=num_past), [q, k, v, fk, fv]
    )


def test_attention_mass_sums_to_one_and_is_zero_where_nothing_can_be_read():
    t, w = 40, 8
    x = [normal(2, t, 2, 4, dtype=torch.float64, seed=i) for i in range(6)]
    index = torch.full((2, 5, 3), -1)
    index[:, 3:] = torch.tensor([0, 5, 9])
    fading = (x[3][:, w:], x[4][:, w:])
    mass = attention_mass(*x[:3], fading, (x[5], x[1], x[2], index), window_size=w, chunk_size=8)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, t, dtype=torch.float64))
    assert (mass[:, :8, 1:] == 0).all()
    assert (mass[:, :24, 2] == 0).all()
    assert (mass[:, 24:] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", ["none", "documents", "past"])
@pytest.mark.parametrize(("t", "taps"), [(1, 4), (3, 4), (40, 2)])
def test_innovation_scores(t, taps, past, dtype):
    y, before = normal(2, t, 5, dtype=dtype), normal(2, taps, 5, dtype=dtype, seed=2) if past == "past" else None
    docs = documents(2, t) if past == "documents" else None
    assert_agree(lambda weight: innovation_scores(y, weight, before, docs), [normal(taps, 5, dtype=dtype, seed=1)])


@pytest.mark.parametrize("tau", [None, 3.0])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("t", "w", "c", "m"), [(1, 3, 2, 2), (30, 5, 3, 4), (30, 5, 5, 100), (64, 16, 8, 1), (50, 7, 1, 6)]
)
def test_innovation_select(t, w, c, m, with_documents, tau):
    scores = (normal(2, t, dtype=torch.float64) * 3).round()  # rounded: ties are common
    position = torch.arange(t).expand(2, -1)
    options = {"num_queries": t, "chunk_size": c, "window_size": w, "num_eidetic": m, "tau": tau}
    docs = documents(2, t) if with_documents else None
    reference, *others = [_select(path, scores, position, doc_ids_bs=docs, **options) for path in PLAIN_PATHS]
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
    index = _select(path, scores, torch.arange(40)[None], **options)
    assert index[0, 3:7, 0].tolist() == [2, 3, 3, 14]  # 9 is a candidate in the third of these


@pytest.mark.parametrize("start", [12, 13])
def test_innovation_select_goes_on_from_kept_slots(start):
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
        got = _select(path, row_scores, rows[None], num_queries=count, start=start, num_slots=m, **options)
        positions = torch.where(got >= 0, rows[got.clamp_min(0)], -1)
        first = start // c
        assert torch.equal(positions, whole[:, first : first + positions.shape[1]])


def _select(path: str, scores: Tensor, position: Tensor, **options: object) -> Tensor:
    with dispatch.use(path):
        return innovation_select(scores, position, **options)


def test_innovation_select_refuses_queries_over_a_chunk_boundary():
    with pytest.raises(ValueError, match="cross a chunk boundary"):
        innovation_select(
            torch.zeros(1, 5), torch.arange(5)[None], num_queries=5, chunk_size=4, window_size=4, num_eidetic=1, start=2
        )


def test_an_unknown_kernel_path_is_refused():
    with (
        dispatch.use("fortran"),
        pytest.raises(ValueError, match="'fortran' does not exist; set BMOJO_KERNELS to one of reference, "),
    ):
        dispatch.chosen(torch.zeros(1))


@pytest.mark.parametrize("path", PLAIN_PATHS)
def test_gradients_pass_gradcheck(path):
    """Against finite differences: the references' own gradients need a check that is not themselves."""
    x = {i: normal(1, 9, 2, 2, dtype=torch.float64, seed=i).requires_grad_() for i in range(7)}
    index = torch.tensor([[[-1, -1], [0, -1], [2, 0]]])
    dt = normal(1, 9, 2, dtype=torch.float64).exp().requires_grad_()
    a, d = -torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weight = normal(2, 3, dtype=torch.float64).requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor, fk: Tensor, fv: Tensor, far_q: Tensor, raw_k: Tensor) -> Tensor:
        return memory_attention(q, k, v, (fk, fv), (far_q, raw_k, v, index), window_size=3, chunk_size=3)

    with dispatch.use(path):
        assert torch.autograd.gradcheck(attention, tuple(x.values()))
        scan = (x[0], dt, a.requires_grad_(), x[1], x[2], d.requires_grad_())
        assert torch.autograd.gradcheck(ssd_scan, scan)
        assert torch.autograd.gradcheck(
            lambda x, w: causal_conv1d(x, w)[0], (x[0].detach().flatten(2)[..., :2].requires_grad_(), weight)
        )
        rates = -torch.rand(4, 2, dtype=torch.float64).add_(0.1)
        selective = [x[i].detach().flatten(2) for i in range(4)]
        selective = [
            selective[0],
            selective[1].exp(),
            rates,
            selective[2][..., :2],
            selective[3][..., :2],
            torch.ones(4).double(),
        ]
        assert torch.autograd.gradcheck(selective_scan, tuple(leaf.clone().requires_grad_() for leaf in selective))


def test_memory_attention_takes_one_tensor_for_several_arguments():
    x = normal(2, 9, 2, 4, dtype=torch.float64)
    assert_agree(lambda x: memory_attention(x, x, x, (x, x), window_size=3), [x])
