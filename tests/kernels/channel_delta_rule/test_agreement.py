"""The delta rule with a decay per channel: chunks against the loop, gradients, documents, decoding, extreme gates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.channel_delta_rule import (
    channel_delta_rule,
    channel_delta_step,
    flops_per_position,
    reference,
    static_path,
    torch_path,
)
from kernels.channel_delta_rule.reference import DeltaInputs
from kernels.channel_delta_rule.torch_path import TOLERANCE, chunked
from kernels.gated_delta_rule import gated_delta_rule
from kernels.operator import use
from tests.kernels.helpers import pairwise


def inputs(b: int, t: int, h: int, n: int, p: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> DeltaInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k = F.normalize(normal(b, t, h, n), dim=-1), F.normalize(normal(b, t, h, n), dim=-1)
    gates = -F.softplus(normal(b, t, h, n) - 2), torch.sigmoid(normal(b, t, h))
    return DeltaInputs(*(m.to(dtype) for m in (q, k, normal(b, t, h, p), *gates)))


def part(x: DeltaInputs, positions: slice) -> DeltaInputs:
    return DeltaInputs(*(m[:, positions] for m in x[:5]))


def cast(x: DeltaInputs, dtype: torch.dtype) -> DeltaInputs:
    return DeltaInputs(*(m.to(dtype) for m in x[:5]))


def state(b: int, h: int, p: int, n: int) -> Tensor:
    return torch.randn(b, h, p, n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def documents(batch: int, t: int, seed: int = 0) -> Tensor:
    return (torch.rand(batch, t, generator=torch.Generator().manual_seed(seed)) < 0.1).long().cumsum(1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    limit = TOLERANCE[expected.dtype] * max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= limit


@pytest.mark.parametrize(
    ("fast", "dtype", "with_documents", "with_initial", "t"),
    pairwise([torch_path, static_path], list(TOLERANCE), [False, True], [False, True], [1, 5, 63, 64, 150]),
)
def test_outputs_state_and_gradients_are_those_of_the_loop(t, with_initial, with_documents, dtype, fast):
    floats = [*inputs(2, t, 3, 5, 4, dtype)[:5], *([state(2, 3, 4, 5).to(dtype)] if with_initial else [])]
    doc_ids = documents(2, t) if with_documents else None
    results = []
    for path in (reference.channel_delta_rule, fast.channel_delta_rule):
        leaves = [m.clone().requires_grad_() for m in floats]
        outputs = path.run(DeltaInputs(*leaves, doc_ids_bt=doc_ids))
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(m.shape, dtype=dtype, generator=generator) for m in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_are_those_of_finite_differences(with_documents):
    leaves = [m.requires_grad_() for m in (*inputs(1, 10, 2, 3, 2)[:5], state(1, 2, 2, 3))]
    doc_ids = documents(1, 10, seed=3) if with_documents else None
    assert torch.autograd.gradcheck(lambda *m: tuple(chunked(DeltaInputs(*m, doc_ids), chunk_size=4)), leaves)


@settings(max_examples=10, deadline=None)
@given(
    t=st.integers(1, 70), size=st.sampled_from([1, 2, 8, 16, 32]), with_documents=st.booleans(), seed=st.integers(0, 99)
)
def test_the_chunk_size_does_not_matter(t, size, with_documents, seed):
    x = inputs(1, t, 2, 4, 3, seed=seed)._replace(initial_bhpn=state(1, 2, 3, 4))
    if with_documents:
        x = x._replace(doc_ids_bt=documents(1, t, seed))
    for found, whole in zip(chunked(x, size), channel_delta_rule(*x), strict=True):
        assert_close(found, whole)


@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 90), data=st.data(), seed=st.integers(0, 99))
def test_pieces_and_steps_are_the_whole(t, data, seed):
    x, read = inputs(2, t, 2, 4, 3, seed=seed), data.draw(st.integers(1, t - 1))
    y, final = channel_delta_rule(*x)
    y_first, memory = channel_delta_rule(*part(x, slice(read)))
    y_rest, end = channel_delta_rule(*part(x, slice(read, None))[:5], memory)
    assert_close(torch.cat([y_first, y_rest], 1), y)
    assert_close(end, final)
    steps = [channel_delta_step(*(m[:, i] for m in x[:5]), memory) for i in range(read, t)]
    assert_close(torch.stack(steps, 1), y[:, read:])
    assert_close(memory, final)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_are_each_alone(lengths, seed):
    x = inputs(1, sum(lengths), 2, 4, 3, seed=seed)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y, final = channel_delta_rule(*x._replace(doc_ids_bt=doc_ids))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    alone = [channel_delta_rule(*part(x, slice(end - n, end))) for n, end in zip(lengths, ends, strict=True)]
    assert_close(y, torch.cat([of_document.y_bthp for of_document in alone], 1))
    assert_close(final, alone[-1].state_bhpn)


@pytest.mark.parametrize("path", ["torch", "static"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_document_moves_no_bit_of_another(dtype, path):
    x, other = inputs(1, 150, 2, 8, 8, dtype), inputs(1, 150, 2, 8, 8, dtype, seed=1)
    inside = torch.zeros(150, dtype=torch.bool)
    inside[37:90] = True
    mixed = (
        torch.where(inside.view(1, -1, *[1] * (m.dim() - 2)), new, m) for m, new in zip(x[:5], other, strict=False)
    )
    doc_ids = torch.tensor([[0] * 37 + [1] * 53 + [2] * 60])
    with use(path):
        y, _ = channel_delta_rule(*x._replace(doc_ids_bt=doc_ids))
        y_mixed, _ = channel_delta_rule(*mixed, doc_ids_bt=doc_ids)
    assert torch.equal(y[:, ~inside], y_mixed[:, ~inside])
    assert not torch.equal(y[:, inside], y_mixed[:, inside])


def test_without_writing_the_state_only_decays():
    x = inputs(1, 100, 2, 4, 3)
    x = x._replace(beta_bth=torch.zeros_like(x.beta_bth), initial_bhpn=state(1, 2, 3, 4))
    y, final = channel_delta_rule(*x)
    kept_bthn = torch.exp(x.log_decay_bthn.cumsum(1))
    assert_close(y, torch.einsum("bthn,bhpn,bthn->bthp", kept_bthn, x.initial_bhpn, x.q_bthn))
    assert_close(final, kept_bthn[:, -1, :, None] * x.initial_bhpn)


def test_without_decay_a_full_write_is_read_back():
    """a = 1, b = 1 is the plain delta rule: a key reads the value that was last written under it."""
    x = inputs(1, 100, 2, 4, 3)
    gates = {"log_decay_bthn": torch.zeros_like(x.log_decay_bthn), "beta_bth": torch.ones_like(x.beta_bth)}
    y, _ = channel_delta_rule(*x._replace(q_bthn=x.k_bthn, **gates))
    assert_close(y, x.v_bthp)


def test_orthogonal_keys_make_it_gated_linear_attention():
    """A new orthogonal key at each position leaves nothing to correct: S is a sum of decayed v k^T."""
    n = 16
    x = inputs(1, n, 1, n, 3)
    y, _ = channel_delta_rule(*x._replace(k_bthn=torch.eye(n, dtype=torch.float64)[None, :, None]))
    logs_ts = x.log_decay_bthn[0, :, 0].cumsum(0)  # the key of position s is channel s
    weights_ts = torch.exp(logs_ts - logs_ts.diagonal()).tril() * x.q_bthn[0, :, 0] * x.beta_bth[0, :, 0]
    assert_close(y[0, :, 0], weights_ts @ x.v_bthp[0, :, 0])


@pytest.mark.parametrize("path", ["torch", "static"])
@settings(max_examples=8, deadline=None)
@given(scale=st.sampled_from([1e-6, 1.0, 1e2, 1e4, 1e30]), seed=st.integers(0, 99))
def test_no_decay_overflows_or_costs_digits(path, scale, seed):
    """Here and there a channel forgets everything, the others nearly nothing; float32 stays as close as usual."""
    x = inputs(1, 300, 2, 4, 3, seed=seed)
    strong = torch.rand(x.log_decay_bthn.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    x = x._replace(log_decay_bthn=torch.where(strong, scale, 1e-2) * x.log_decay_bthn)
    leaves = [m.float().requires_grad_() for m in x[:5]]
    with use(path):
        y, final = channel_delta_rule(*leaves)
    expected, _ = reference.channel_delta_rule.run(DeltaInputs(*(m.detach().double() for m in leaves)))
    assert_close(y, expected.float())
    for grad in torch.autograd.grad(y.sum() + final.sum(), leaves):
        assert bool(grad.isfinite().all())


def test_equal_keys_cost_no_digits():
    """Every position overwrites the one before: the triangular system is then at its worst."""
    x = inputs(1, 256, 2, 8, 8, torch.float32)
    k = x.k_bthn[:, :1].expand_as(x.k_bthn)
    gates = {"log_decay_bthn": torch.zeros_like(x.log_decay_bthn), "beta_bth": torch.ones_like(x.beta_bth)}
    y, _ = channel_delta_rule(*x._replace(q_bthn=k, k_bthn=k, **gates))
    assert_close(y, x.v_bthp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    x = inputs(1, 100, 2, 8, 8, dtype)
    y, final = channel_delta_rule(*x)
    wide_y, wide_final = channel_delta_rule(*cast(x, torch.float32))
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert torch.equal(y, wide_y.to(dtype))
    assert torch.equal(final, wide_final)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(channel_delta_rule(*x).y_bthp, y)


def test_it_compiles_whole():
    """One head: the strides of such tensors are what a trace misjudges most easily."""
    leaves = [m.requires_grad_() for m in inputs(1, 150, 1, 4, 4, torch.float32)[:5]]
    doc_ids = documents(1, 150)
    compiled = torch.compile(channel_delta_rule, fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad(call(*leaves, doc_ids_bt=doc_ids).y_bthp.sum(), leaves)
        for call in (channel_delta_rule, compiled)
    ]
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


def test_flops_are_those_of_the_flop_counter():
    with FlopCounterMode(display=False) as counter:
        channel_delta_rule(*inputs(2, 128, 3, 8, 5))
    assert counter.get_total_flops() == pytest.approx(2 * 128 * 3 * flops_per_position(8, 5))


def test_with_one_decay_for_all_channels_it_is_the_gated_delta_rule():
    x = inputs(2, 100, 2, 16, 8)._replace(initial_bhpn=state(2, 2, 8, 16), doc_ids_bt=documents(2, 100))
    one_bth = x.log_decay_bthn[..., 0]
    expected = gated_delta_rule(*x._replace(log_decay_bthn=one_bth))
    found = channel_delta_rule(*x._replace(log_decay_bthn=one_bth[..., None].expand_as(x.log_decay_bthn)))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
