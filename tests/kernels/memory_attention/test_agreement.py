"""The plain paths of memory attention against the reference in float64, at small sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.memory_attention import AttentionInputs, Eidetic, KeysValues, attention_mass, memory_attention
from kernels.operator import use
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, documents, normal, pairwise, run

SIZES = [(1, 3, 2, 2), (7, 9, 4, 3), (40, 8, 8, 5), (300, 60, 7, 3), (290, 140, 140, 9)]


@pytest.mark.parametrize(
    ("path", "size", "kv_heads", "with_documents", "dtype"),
    [(path, *row) for path in ("torch", "cpp", "static") for row in pairwise(SIZES, [1, 2, 4], [False, True], DTYPES)],
)
def test_output_and_gradients_match_the_reference(path, size, kv_heads, with_documents, dtype):
    t, w, c, m = size
    rows = {"k": t, "v": t, "fading_k": max(t - w, 1), "fading_v": max(t - w, 1), "eidetic_k": t}
    inputs = {name: normal(2, t, 4, 6, dtype=dtype, seed=i) for i, name in enumerate(("q", "eidetic_q"))}
    inputs |= {
        name: normal(2, count, kv_heads, 6, dtype=dtype, seed=2 + i) for i, (name, count) in enumerate(rows.items())
    }
    chunks = -(-t // c)
    index = torch.stack(
        [torch.randperm(max(t, m), generator=torch.Generator().manual_seed(i))[:m] for i in range(2 * chunks)]
    )
    index = torch.where(index < t, index, -1).view(2, chunks, m)
    docs = documents(2, t) if with_documents else None

    def attention(q: Tensor, far_q: Tensor, k: Tensor, v: Tensor, fk: Tensor, fv: Tensor, raw_k: Tensor) -> Tensor:
        return memory_attention(
            q, k, v, KeysValues(fk, fv), Eidetic(far_q, raw_k, v, index), window_size=w, chunk_size=c, doc_ids_bt=docs
        )

    got = run(path, attention, inputs)
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, run("reference", attention, inputs, torch.float64), TOLERANCE)


@pytest.mark.parametrize("num_past", [0, 3, 20])
@pytest.mark.parametrize("path", ["torch", "cpp", "static"])
def test_only_the_past_there_is_is_read(path, num_past):
    t, w = 11, 6
    rows = {"q": (t, 2), "k": (t + w, 2), "v": (t + w, 2), "fading_k": (t + w, 2), "fading_v": (t + w, 2)}
    inputs = {name: normal(1, *shape, 4, dtype=torch.float64, seed=i) for i, (name, shape) in enumerate(rows.items())}

    def attention(q: Tensor, k: Tensor, v: Tensor, fk: Tensor, fv: Tensor) -> Tensor:
        return memory_attention(q, k, v, KeysValues(fk, fv), window_size=w, num_past=num_past)

    assert_close(run(path, attention, inputs), run("reference", attention, inputs), TOLERANCE)


@pytest.mark.parametrize("path", ["torch", "cpp", "static"])
def test_one_tensor_serves_several_arguments(path):
    x = {"x": normal(2, 9, 2, 4, dtype=torch.float64)}

    def attention(x: Tensor) -> Tensor:
        return memory_attention(x, x, x, KeysValues(x, x), window_size=3)

    assert_close(run(path, attention, x), run("reference", attention, x), TOLERANCE)


@pytest.mark.parametrize("path", ["reference", "torch", "cpp", "static"])
def test_gradients_pass_gradcheck(path):
    """Against finite differences: the reference's own gradients need a check that is not themselves."""
    leaves = tuple(normal(1, 9, 2, 2, dtype=torch.float64, seed=i).requires_grad_() for i in range(7))
    index = torch.tensor([[[-1, -1], [0, -1], [2, 0]]])

    def attention(q: Tensor, k: Tensor, v: Tensor, fk: Tensor, fv: Tensor, far_q: Tensor, raw_k: Tensor) -> Tensor:
        return memory_attention(
            q, k, v, KeysValues(fk, fv), Eidetic(far_q, raw_k, v, index), window_size=3, chunk_size=3
        )

    with use(path):
        assert torch.autograd.gradcheck(attention, leaves)


def test_attention_mass_sums_to_one_and_is_zero_where_nothing_can_be_read():
    t, w = 40, 8
    x = [normal(2, t, 2, 4, dtype=torch.float64, seed=i) for i in range(6)]
    index = torch.full((2, 5, 3), -1)
    index[:, 3:] = torch.tensor([0, 5, 9])
    fading, eidetic = KeysValues(x[3][:, w:], x[4][:, w:]), Eidetic(x[5], x[1], x[2], index)
    mass = attention_mass(AttentionInputs(*x[:3], fading, eidetic, window_size=w, chunk_size=8))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, t, dtype=torch.float64))
    assert (mass[:, :8, 1:] == 0).all()
    assert (mass[:, :24, 2] == 0).all()
    assert (mass[:, 24:] > 0).all()
