"""The gated delta rule: chunks against the loop, gradients, documents, decoding, limits of the gates."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference, gated_delta_step
from kernels.gated_delta_rule.torch_path import flops_per_position, gated_delta_rule_torch, inverse_of

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest value; see README.md


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor

    def part(self, positions: slice) -> Inputs:
        return Inputs(*(m[:, positions] for m in self))


def inputs(b: int, t: int, h: int, n: int, p: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k = F.normalize(normal(b, t, h, n), dim=-1), F.normalize(normal(b, t, h, n), dim=-1)
    gates = -F.softplus(normal(b, t, h) - 2), torch.sigmoid(normal(b, t, h))
    return Inputs(*(m.to(dtype) for m in (q, k, normal(b, t, h, p), *gates)))


def state(b: int, h: int, p: int, n: int, seed: int = 9) -> Tensor:
    return torch.randn(b, h, p, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def documents(batch: int, t: int, seed: int = 0) -> Tensor:
    return (torch.rand(batch, t, generator=torch.Generator().manual_seed(seed)) < 0.1).long().cumsum(1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    limit = TOLERANCE[expected.dtype] * max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= limit


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("t", [1, 5, 63, 64, 150])
def test_outputs_state_and_gradients_are_those_of_the_loop(t, with_initial, with_documents, dtype):
    floats = [*inputs(2, t, 3, 5, 4, dtype)]
    if with_initial:
        floats.append(state(2, 3, 4, 5).to(dtype))
    doc_ids = documents(2, t) if with_documents else None
    results = []
    for path in (gated_delta_rule_reference, gated_delta_rule_torch):
        leaves = [m.clone().requires_grad_() for m in floats]
        y, final = path(*leaves[:5], leaves[5] if with_initial else None, doc_ids)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(m.shape, dtype=dtype, generator=generator) for m in (y, final)]
        results.append([y, final, *torch.autograd.grad([y, final], leaves, cotangents)])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_are_those_of_finite_differences(with_documents):
    leaves = [m.requires_grad_() for m in (*inputs(1, 10, 2, 3, 2), state(1, 2, 2, 3))]
    doc_ids = documents(1, 10, seed=3) if with_documents else None
    assert torch.autograd.gradcheck(lambda *m: gated_delta_rule_torch(*m, doc_ids, chunk_size=4), leaves)


@settings(max_examples=25, deadline=None)
@given(
    t=st.integers(1, 70), size=st.sampled_from([1, 2, 8, 16, 32]), with_documents=st.booleans(), seed=st.integers(0, 99)
)
def test_the_chunk_size_does_not_matter(t, size, with_documents, seed):
    x, initial = inputs(1, t, 2, 4, 3, seed=seed), state(1, 2, 3, 4)
    doc_ids = documents(1, t, seed) if with_documents else None
    expected = gated_delta_rule_torch(*x, initial, doc_ids)
    for found, whole in zip(gated_delta_rule_torch(*x, initial, doc_ids, chunk_size=size), expected, strict=True):
        assert_close(found, whole)


@settings(max_examples=25, deadline=None)
@given(t=st.integers(2, 90), data=st.data(), seed=st.integers(0, 99))
def test_pieces_and_steps_are_the_whole(t, data, seed):
    x, read = inputs(2, t, 2, 4, 3, seed=seed), data.draw(st.integers(1, t))
    y, final = gated_delta_rule(*x)
    y_first, memory = gated_delta_rule(*x.part(slice(read)))
    steps = [gated_delta_step(*(m[:, i] for m in x), memory) for i in range(read, t)]
    assert_close(torch.cat([y_first, *(y_bhp[:, None] for y_bhp in steps)], 1), y)
    assert_close(memory, final)
    if read < t:
        _, middle = gated_delta_rule(*x.part(slice(read)))
        y_rest, end = gated_delta_rule(*x.part(slice(read, None)), middle)
        assert_close(torch.cat([y_first, y_rest], 1), y)
        assert_close(end, final)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_are_each_alone(lengths, seed):
    x = inputs(1, sum(lengths), 2, 4, 3, seed=seed)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y, final = gated_delta_rule(*x, doc_ids_bt=doc_ids)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    alone = [gated_delta_rule(*x.part(slice(end - n, end))) for n, end in zip(lengths, ends, strict=True)]
    assert_close(y, torch.cat([y_document for y_document, _ in alone], 1))
    assert_close(final, alone[-1][1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_document_moves_no_bit_of_another(dtype):
    x, other = inputs(1, 150, 2, 8, 8, dtype), inputs(1, 150, 2, 8, 8, dtype, seed=1)
    inside = torch.zeros(150, dtype=torch.bool)
    inside[37:90] = True
    doc_ids = inside.diff(prepend=inside[:1]).long().cumsum(0)[None]
    changed = Inputs(
        *(torch.where(inside.view(1, -1, *[1] * (m.dim() - 2)), a, m) for m, a in zip(x, other, strict=True))
    )
    y, _ = gated_delta_rule(*x, doc_ids_bt=doc_ids)
    y_changed, _ = gated_delta_rule(*changed, doc_ids_bt=doc_ids)
    assert torch.equal(y[:, ~inside], y_changed[:, ~inside])
    assert not torch.equal(y[:, inside], y_changed[:, inside])


def test_without_writing_the_state_only_decays():
    x, initial = inputs(1, 100, 2, 4, 3), state(1, 2, 3, 4)
    y, final = gated_delta_rule(*x._replace(beta=torch.zeros_like(x.beta)), initial)
    kept = torch.exp(x.log_decay.cumsum(1))
    assert_close(y, torch.einsum("bth,bhpn,bthn->bthp", kept, initial, x.q))
    assert_close(final, kept[:, -1, :, None, None] * initial)


def test_without_decay_full_writes_are_read_back():
    """a = 1, b = 1 is the plain delta rule: the value written last under a key is what the key reads."""
    x = inputs(1, 100, 2, 4, 3)
    x = x._replace(q=x.k, log_decay=torch.zeros_like(x.log_decay), beta=torch.ones_like(x.beta))
    y, _ = gated_delta_rule(*x)
    assert_close(y, x.v)


def test_orthogonal_keys_give_gated_linear_attention():
    """With a new orthogonal key at each position there is nothing to correct: S sums decayed v k^T."""
    n = 16
    x = inputs(1, n, 1, n, 3)
    x = x._replace(k=torch.eye(n, dtype=torch.float64)[None, :, None])
    y, _ = gated_delta_rule(*x)
    logs = x.log_decay[0, :, 0].cumsum(0)
    scores = x.q[0, :, 0]  # of position t with the key of s: its channel s
    weights = torch.exp(logs[:, None] - logs).tril() * scores * x.beta[0, :, 0]
    assert_close(y[0, :, 0], weights @ x.v[0, :, 0])


@settings(max_examples=15, deadline=None)
@given(scale=st.sampled_from([1e-6, 1.0, 1e2, 1e4, 1e30]), seed=st.integers(0, 99))
def test_no_decay_overflows_or_costs_digits(scale, seed):
    """Some positions forget everything, the others nearly nothing; float32 stays as close as usual to float64."""
    x = inputs(1, 1000, 2, 4, 3, seed=seed)
    strong = torch.rand(x.beta.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    x = x._replace(log_decay=torch.where(strong, x.log_decay * scale, x.log_decay * 1e-2))
    single = Inputs(*(m.float().requires_grad_() for m in x))
    expected, _ = gated_delta_rule_reference(*(m.detach().double() for m in single))
    y, final = gated_delta_rule(*single)
    limit = TOLERANCE[torch.float32] * max(1.0, float(expected.abs().max()))
    assert float((y - expected).detach().abs().max()) <= limit
    for grad in torch.autograd.grad(y.sum() + final.sum(), list(single)):
        assert bool(grad.isfinite().all())


def test_equal_keys_cost_no_digits():
    """The system is then as badly conditioned as it gets: every position overwrites the one before."""
    x = inputs(1, 256, 2, 8, 8)
    k = x.k[:, :1].expand_as(x.k)
    x = x._replace(q=k, k=k, log_decay=torch.zeros_like(x.log_decay), beta=torch.ones_like(x.beta))
    y, _ = gated_delta_rule(*(m.float() for m in x))
    assert_close(y, x.v.float())


def test_the_inverse_is_that_of_the_triangle():
    lower = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1) * 0.3
    identity = torch.eye(32, dtype=torch.float64)
    assert_close(inverse_of(lower) @ (identity + lower), identity.expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    x = inputs(1, 100, 2, 8, 8, dtype)
    y, final = gated_delta_rule(*x)
    y_wide, final_wide = gated_delta_rule(*(m.float() for m in x))
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert torch.equal(y, y_wide.to(dtype))
    assert torch.equal(final, final_wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_delta_rule(*x)[0], y)


def test_it_compiles_whole():
    x, doc_ids = inputs(1, 150, 1, 4, 4, torch.float32), documents(1, 150)
    compiled = torch.compile(gated_delta_rule_torch, fullgraph=True, backend="aot_eager")
    leaves = [m.requires_grad_() for m in x]
    results = [
        torch.autograd.grad(path(*leaves, None, doc_ids)[0].sum(), leaves)
        for path in (gated_delta_rule_torch, compiled)
    ]
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


def test_flops_are_those_of_the_flop_counter():
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule_torch(*inputs(2, 128, 3, 8, 5))
    assert counter.get_total_flops() == pytest.approx(2 * 128 * 3 * flops_per_position(8, 5))


def test_another_implementation_agrees():
    """That of Hugging Face's Qwen3-Next, which scales queries by 1 / sqrt(n) and keeps states as [n, p]."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x, initial = inputs(2, 100, 2, 16, 8, torch.float32), state(2, 2, 8, 16).float()
    expected, last = qwen.torch_recurrent_gated_delta_rule(
        x.q * 4, x.k, x.v, g=x.log_decay, beta=x.beta, initial_state=initial.mT, output_final_state=True
    )
    y, final = gated_delta_rule(*x, initial)
    assert_close(y, expected)
    assert_close(final, last.mT)
