"""Memory attention in C++: sizes that fill tiles, blocks and spans, thread counts, documents, the decoding step.

test_agreement.py has the small sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.memory_attention import Eidetic, KeysValues, Slots, cpp_path, memory_attention, memory_attention_step
from kernels.operator import use
from tests.kernels.helpers import DTYPES, TOLERANCE, normal, pairwise


def slots_of(chunk_start: int, w: int, m: int, docs: Tensor | None) -> Tensor:
    """Some positions of the chunk's document that have left its window, and empty slots if there are too few."""
    left = torch.randperm(max(0, chunk_start - w + 1), generator=torch.Generator().manual_seed(chunk_start))
    if docs is not None:
        left = left[docs[0, left] == docs[0, chunk_start]]
    return torch.cat([left[:m], left.new_full((m - len(left[:m]),), -1)])


def attend(
    path: str,
    t: int,
    w: int,
    c: int,
    m: int,
    *,
    dtype: torch.dtype = torch.float64,
    docs: Tensor | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    p: int = 64,
    own_values: bool = False,
    scale: Tensor | None = None,
) -> list[Tensor]:
    """Output and all gradients; keys and values are views of one projection, as in the model."""
    q, far_q = (normal(1, t, heads, p, seed=i, dtype=dtype) for i in range(2))
    rows = (t, max(t - w, 1), t)
    u_kv, y_kv, far_kv = (normal(1, n, 2 * kv_heads, p, seed=2 + i, dtype=dtype) for i, n in enumerate(rows))
    leaves = [q, far_q, u_kv, y_kv, far_kv]
    if scale is not None:
        leaves = [x * scale.to(dtype)[None, : x.shape[1], None, None] for x in leaves]
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, far_q, u_kv, y_kv, far_kv = leaves
    k, v = u_kv.chunk(2, 2)
    far_k, far_v = far_kv.chunk(2, 2)
    index = torch.stack([slots_of(j * c, w, m, docs) for j in range(-(-t // c))])[None]
    fading, eidetic = KeysValues(*y_kv.chunk(2, 2)), Eidetic(far_q, far_k, far_v if own_values else v, index)
    with use(path):
        out = memory_attention(q, k, v, fading, eidetic, window_size=w, chunk_size=c, doc_ids_bt=docs)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9, dtype=dtype), allow_unused=True)]


@pytest.mark.parametrize(
    ("size", "own_values", "dtype"),
    pairwise(
        [
            (450, 200, 70, 20, 1, 64),
            (330, 40, 33, 7, 2, 32),
            (130, 128, 128, 64, 2, 80),
            (600, 600, 100, 3, 1, 20),
            (330, 40, 33, 7, 1, 32),
            (300, 70, 70, 20, 2, 64),
        ],
        [False, True],
        DTYPES,
    ),
)
def test_output_and_gradients_agree_with_the_reference(size, own_values, dtype, nan_memory, monkeypatch):
    t, w, c, m, kv_heads, p = size
    monkeypatch.setattr(cpp_path, "SPAN", 100)  # several spans in few positions: the reference's time is quadratic
    options = {"dtype": dtype, "kv_heads": kv_heads, "p": p, "own_values": own_values}
    want, got = (attend(path, t, w, c, m, **options) for path in ("reference", "cpp"))
    for expected, found in zip(want, got, strict=True):
        if expected is None:
            assert found is None
        else:
            assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("num_past", [0, 10, 100])
def test_rows_that_are_no_past_get_no_gradient(num_past, nan_memory):
    """One query head per key/value head, whole vectors: gradients are added up where they belong."""
    t, w, p = 50, 16, 64
    inputs = [
        normal(1, rows, 2, p, dtype=torch.float64, seed=i) for i, rows in enumerate([t, t + w, t + w, t + w, t + w])
    ]
    results = []
    for path in ("reference", "cpp"):
        q, k, v, fading_k, fading_v = leaves = [x.detach().requires_grad_() for x in inputs]
        with use(path):
            out = memory_attention(q, k, v, KeysValues(fading_k, fading_v), window_size=w, num_past=num_past)
        results.append([out, *torch.autograd.grad(out, leaves, normal(*out.shape, dtype=torch.float64, seed=9))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_the_number_of_threads_changes_no_bit(each_number_of_threads):
    options = {"dtype": torch.float32, "heads": 4, "kv_heads": 2}
    first, *others = (attend("cpp", 1300, 50, 25, 9, **options) for _ in each_number_of_threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a is not None)


@pytest.mark.parametrize("factor", [-1.0, 1e4])
def test_documents_never_see_one_another_by_one_bit(factor):
    docs = torch.zeros(1, 400, dtype=torch.int64)
    docs[:, 90:250], docs[:, 250:] = 1, 2
    scale = torch.where(docs[0] == 1, factor, 1.0)
    before = attend("cpp", 400, 60, 30, 12, dtype=torch.float32, docs=docs)
    after = attend("cpp", 400, 60, 30, 12, dtype=torch.float32, docs=docs, scale=scale)
    others = docs[0] != 1
    for a, b in zip(before, after, strict=True):
        if a is not None:
            assert torch.equal(a[:, others[: a.shape[1]]], b[:, others[: a.shape[1]]])
    assert not torch.equal(before[0][:, ~others], after[0][:, ~others])


def test_a_token_changes_nothing_before_it_by_one_bit():
    scale = torch.ones(300)
    scale[170] = 50.0
    before, after = attend("cpp", 300, 60, 30, 12)[0], attend("cpp", 300, 60, 30, 12, scale=scale)[0]
    assert torch.equal(before[:, :170], after[:, :170])
    assert not torch.equal(before[:, 170:], after[:, 170:])


@pytest.mark.parametrize("magnitude", [1e3, 1e18])
def test_large_scores_give_no_nan(magnitude):
    scale = torch.full((200,), magnitude**0.5, dtype=torch.float64)
    results = attend("cpp", 200, 30, 30, 8, dtype=torch.float32, scale=scale)
    assert all(x.isfinite().all() for x in results if x is not None)


@pytest.mark.parametrize(
    ("positions", "heads", "dtype"),
    pairwise([(0, 3), (17, 40), (41, 1000)], [(1, 64), (2, 20), (4, 7)], DTYPES),
)
def test_the_decoding_step_agrees_with_plain_torch(positions, heads, dtype, nan_memory):
    kv_heads, p = heads
    w, m, b = 16, 6, 2
    q, far_q = (normal(b, 4, p, seed=i, dtype=dtype) for i in range(2))
    window = [normal(b, w + 4, kv_heads, p, seed=2 + i, dtype=dtype) for i in range(2)]
    fading = KeysValues(*(normal(b, 2 * w + 4, kv_heads, p, seed=4 + i, dtype=dtype) for i in range(2)))
    slots = [normal(b, m, kv_heads, p, seed=6 + i, dtype=dtype) for i in range(2)]
    eidetic = Slots(far_q, *slots, torch.tensor([[3, -1, 0, 7, -1, 1], [-1] * m]))
    results = []
    for path in ("torch", "cpp"):
        with use(path):
            step = memory_attention_step(q, *window, torch.tensor(positions), fading, eidetic, window_size=w)
        results.append(step)
    want, got = results
    assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())


def test_rows_and_shapes_that_would_be_read_beyond_the_end_are_refused():
    q, k = normal(1, 8, 2, 4), normal(1, 8, 1, 4, seed=1)
    index = torch.tensor([[[0, 8]]])
    with use("cpp"):
        with pytest.raises(ValueError, match="3 fading rows, but 8 queries with window_size 4 read 4 of their own"):
            memory_attention(q, k, k, KeysValues(k[:, :3], k[:, :3]), window_size=4)
        with pytest.raises(IndexError, match="index_bjm names row 8 of 8 eidetic rows"):
            memory_attention(q, k, k, None, Eidetic(q, k, k, index), window_size=4, chunk_size=8)
        with pytest.raises(
            ValueError, match=r"v has shape \(1, 7, 1, 4\); the other inputs' shapes ask for \(1, 8, 1, 4\)"
        ):
            memory_attention(q, k, k[:, 1:], window_size=4)
        with pytest.raises(ValueError, match="3 query heads are not a multiple of the 2 key/value heads"):
            memory_attention(q[:, :, [0, 1, 1]], k.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), window_size=4)
        two = q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1)
        eidetic = Eidetic(*two, two[1], index[:, :, :1])
        with pytest.raises(ValueError, match="index_bjm has shape"):
            memory_attention(two[0], two[1], two[1], None, eidetic, window_size=4, chunk_size=8)
        with pytest.raises(ValueError, match="and no past"):
            memory_attention(q, k, k, window_size=1, num_past=2, doc_ids_bt=torch.zeros(1, 8, dtype=torch.int64))
        ring, at = k[:, :4], torch.tensor([3])
        with pytest.raises(ValueError, match="v_brhp has shape"):
            memory_attention_step(q[:, 0], ring, k, at, window_size=4)
        with pytest.raises(ValueError, match="position_b has shape"):
            memory_attention_step(two[0][:, 0], two[1], two[1], at, window_size=4)


def test_memory_of_the_backward_grows_with_the_rows_there_are_not_with_the_window():
    results = [attend(path, 40, 1 << 40, 40, 2) for path in ("reference", "cpp")]
    for want, got in zip(*results, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want)
