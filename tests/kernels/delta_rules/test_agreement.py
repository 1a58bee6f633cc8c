"""The delta rules with a decay per head and per channel: chunks against the loop, gradients, documents, decoding,
limits of the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import channel_delta_rule as channel
from kernels import gated_delta_rule as gated
from kernels.gated_delta_rule.torch_path import TOLERANCE, inverse_of
from kernels.operator import use
from tests.kernels.helpers import pairwise


class Rule(NamedTuple):
    """One of the two rules; `over`, `step`: its operators for whole sequences and for one position."""

    name: str
    package: ModuleType
    over: Callable[..., Any]
    step: Callable[..., Tensor]
    has_channel_decay: bool

    def path(self, name: str) -> Any:
        """Its implementation "reference", "torch_path" or "static_path", whatever was chosen for the process."""
        return getattr(getattr(self.package, name), self.name)

    def chunked(self, x: Any, size: int) -> tuple[Tensor, Tensor]:
        return self.package.torch_path.chunked(x, size)

    def of(self, *floats: Tensor, **others: Tensor | None) -> Any:
        return self.package.reference.DeltaInputs(*floats, **others)

    def with_gates(self, x: Any, log_decay: float, beta: float) -> Any:
        return self.of(*x[:3], torch.full_like(x[3], log_decay), torch.full_like(x[4], beta))

    def inputs(self, b: int, t: int, h: int, n: int, p: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        q, k = F.normalize(normal(b, t, h, n), dim=-1), F.normalize(normal(b, t, h, n), dim=-1)
        decay_shape = (b, t, h, n) if self.has_channel_decay else (b, t, h)
        gates = -F.softplus(normal(*decay_shape) - 2), torch.sigmoid(normal(b, t, h))
        return self.of(*(m.to(dtype) for m in (q, k, normal(b, t, h, p), *gates)))

    def log_decay_bthn(self, x: Any) -> Tensor:
        return x[3] if self.has_channel_decay else x[3][..., None].expand_as(x.k_bthn)


RULES = [
    Rule("gated_delta_rule", gated, gated.gated_delta_rule, gated.gated_delta_step, has_channel_decay=False),
    Rule("channel_delta_rule", channel, channel.channel_delta_rule, channel.channel_delta_step, has_channel_decay=True),
]
of_each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def part(rule: Rule, x: Any, positions: slice) -> Any:
    return rule.of(*(m[:, positions] for m in x[:5]))


def state(b: int, h: int, p: int, n: int) -> Tensor:
    return torch.randn(b, h, p, n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def documents(batch: int, t: int, seed: int = 0) -> Tensor:
    return (torch.rand(batch, t, generator=torch.Generator().manual_seed(seed)) < 0.1).long().cumsum(1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    limit = TOLERANCE[expected.dtype] * max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= limit


@of_each_rule
@pytest.mark.parametrize(
    ("path", "dtype", "with_documents", "with_initial", "t"),
    pairwise(["torch_path", "static_path"], list(TOLERANCE), [False, True], [False, True], [1, 5, 63, 64, 150]),
)
def test_outputs_state_and_gradients_are_those_of_the_loop(t, with_initial, with_documents, dtype, path, rule):
    floats = [*rule.inputs(2, t, 3, 5, 4, dtype)[:5], *([state(2, 3, 4, 5).to(dtype)] if with_initial else [])]
    doc_ids = documents(2, t) if with_documents else None
    results = []
    for name in ("reference", path):
        leaves = [m.clone().requires_grad_() for m in floats]
        outputs = rule.path(name).run(rule.of(*leaves, doc_ids_bt=doc_ids))
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(m.shape, dtype=dtype, generator=generator) for m in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@of_each_rule
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_are_those_of_finite_differences(with_documents, rule):
    leaves = [m.requires_grad_() for m in (*rule.inputs(1, 10, 2, 3, 2)[:5], state(1, 2, 2, 3))]
    doc_ids = documents(1, 10, seed=3) if with_documents else None
    assert torch.autograd.gradcheck(lambda *m: tuple(rule.chunked(rule.of(*m, doc_ids_bt=doc_ids), 4)), leaves)


@of_each_rule
@settings(max_examples=10, deadline=None)
@given(
    t=st.integers(1, 70), size=st.sampled_from([1, 2, 8, 16, 32]), with_documents=st.booleans(), seed=st.integers(0, 99)
)
def test_the_chunk_size_does_not_matter(t, size, with_documents, seed, rule):
    x = rule.inputs(1, t, 2, 4, 3, seed=seed)._replace(initial_bhpn=state(1, 2, 3, 4))
    if with_documents:
        x = x._replace(doc_ids_bt=documents(1, t, seed))
    for found, whole in zip(rule.chunked(x, size), rule.over(*x), strict=True):
        assert_close(found, whole)


@of_each_rule
@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 90), data=st.data(), seed=st.integers(0, 99))
def test_pieces_and_steps_are_the_whole(t, data, seed, rule):
    x, read = rule.inputs(2, t, 2, 4, 3, seed=seed), data.draw(st.integers(1, t - 1))
    y, final = rule.over(*x)
    y_first, memory = rule.over(*part(rule, x, slice(read)))
    y_rest, end = rule.over(*part(rule, x, slice(read, None))[:5], memory)
    assert_close(torch.cat([y_first, y_rest], 1), y)
    assert_close(end, final)
    steps = [rule.step(*(m[:, i] for m in x[:5]), memory) for i in range(read, t)]
    assert_close(torch.stack(steps, 1), y[:, read:])
    assert_close(memory, final)


@of_each_rule
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_are_each_alone(lengths, seed, rule):
    x = rule.inputs(1, sum(lengths), 2, 4, 3, seed=seed)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y, final = rule.over(*x._replace(doc_ids_bt=doc_ids))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    alone = [rule.over(*part(rule, x, slice(end - n, end))) for n, end in zip(lengths, ends, strict=True)]
    assert_close(y, torch.cat([of_document.y_bthp for of_document in alone], 1))
    assert_close(final, alone[-1].state_bhpn)


@of_each_rule
@pytest.mark.parametrize("path", ["torch", "static"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_document_moves_no_bit_of_another(dtype, path, rule):
    x, other = rule.inputs(1, 150, 2, 8, 8, dtype), rule.inputs(1, 150, 2, 8, 8, dtype, seed=1)
    inside = torch.zeros(150, dtype=torch.bool)
    inside[37:90] = True
    mixed = (
        torch.where(inside.view(1, -1, *[1] * (m.dim() - 2)), new, m) for m, new in zip(x[:5], other, strict=False)
    )
    doc_ids = torch.tensor([[0] * 37 + [1] * 53 + [2] * 60])
    with use(path):
        y, _ = rule.over(*x._replace(doc_ids_bt=doc_ids))
        y_mixed, _ = rule.over(*mixed, doc_ids_bt=doc_ids)
    assert torch.equal(y[:, ~inside], y_mixed[:, ~inside])
    assert not torch.equal(y[:, inside], y_mixed[:, inside])


@of_each_rule
def test_without_writing_the_state_only_decays(rule):
    x = rule.inputs(1, 100, 2, 4, 3)
    x = x._replace(beta_bth=torch.zeros_like(x.beta_bth), initial_bhpn=state(1, 2, 3, 4))
    y, final = rule.over(*x)
    kept_bthn = torch.exp(rule.log_decay_bthn(x).cumsum(1))
    assert_close(y, torch.einsum("bthn,bhpn,bthn->bthp", kept_bthn, x.initial_bhpn, x.q_bthn))
    assert_close(final, kept_bthn[:, -1, :, None] * x.initial_bhpn)


@of_each_rule
def test_without_decay_a_full_write_is_read_back(rule):
    """a = 1, b = 1 is the plain delta rule: a key reads the value that was last written under it."""
    x = rule.with_gates(rule.inputs(1, 100, 2, 4, 3), log_decay=0.0, beta=1.0)
    y, _ = rule.over(*x._replace(q_bthn=x.k_bthn))
    assert_close(y, x.v_bthp)


@of_each_rule
def test_orthogonal_keys_make_it_gated_linear_attention(rule):
    """A new orthogonal key at each position leaves nothing to correct: S is a sum of decayed v k^T."""
    n = 16
    x = rule.inputs(1, n, 1, n, 3)
    y, _ = rule.over(*x._replace(k_bthn=torch.eye(n, dtype=torch.float64)[None, :, None]))
    logs_ts = rule.log_decay_bthn(x)[0, :, 0].cumsum(0)  # the key of position s is channel s
    weights_ts = torch.exp(logs_ts - logs_ts.diagonal()).tril() * x.q_bthn[0, :, 0] * x.beta_bth[0, :, 0]
    assert_close(y[0, :, 0], weights_ts @ x.v_bthp[0, :, 0])


@of_each_rule
@pytest.mark.parametrize("path", ["torch", "static"])
@settings(max_examples=8, deadline=None)
@given(scale=st.sampled_from([1e-6, 1.0, 1e2, 1e4, 1e30]), seed=st.integers(0, 99))
def test_no_decay_overflows_or_costs_digits(path, scale, seed, rule):
    """Here and there everything is forgotten, elsewhere nearly nothing; float32 stays as close as usual."""
    x = rule.inputs(1, 300, 2, 4, 3, seed=seed)
    strong = torch.rand(x[3].shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    x = rule.of(*x[:3], torch.where(strong, scale, 1e-2) * x[3], x.beta_bth)
    leaves = [m.float().requires_grad_() for m in x[:5]]
    with use(path):
        y, final = rule.over(*leaves)
    expected, _ = rule.path("reference").run(rule.of(*(m.detach().double() for m in leaves)))
    assert_close(y, expected.float())
    for grad in torch.autograd.grad(y.sum() + final.sum(), leaves):
        assert bool(grad.isfinite().all())


@of_each_rule
def test_equal_keys_cost_no_digits(rule):
    """Every position overwrites the one before: the triangular system is then at its worst."""
    x = rule.with_gates(rule.inputs(1, 256, 2, 8, 8, torch.float32), log_decay=0.0, beta=1.0)
    k = x.k_bthn[:, :1].expand_as(x.k_bthn)
    y, _ = rule.over(*x._replace(q_bthn=k, k_bthn=k))
    assert_close(y, x.v_bthp)


@of_each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype, rule):
    x = rule.inputs(1, 100, 2, 8, 8, dtype)
    y, final = rule.over(*x)
    wide_y, wide_final = rule.over(*(m.float() for m in x[:5]))
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert torch.equal(y, wide_y.to(dtype))
    assert torch.equal(final, wide_final)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rule.over(*x).y_bthp, y)


@of_each_rule
def test_it_compiles_whole(rule):
    """One head: the strides of such tensors are what a trace misjudges most easily."""
    leaves = [m.requires_grad_() for m in rule.inputs(1, 150, 1, 4, 4, torch.float32)[:5]]
    doc_ids = documents(1, 150)
    compiled = torch.compile(rule.over, fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad(call(*leaves, doc_ids_bt=doc_ids).y_bthp.sum(), leaves) for call in (rule.over, compiled)
    ]
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected)


@of_each_rule
def test_flops_are_those_of_the_flop_counter(rule):
    with FlopCounterMode(display=False) as counter:
        rule.over(*rule.inputs(2, 128, 3, 8, 5))
    assert counter.get_total_flops() == pytest.approx(2 * 128 * 3 * rule.package.flops_per_position(8, 5))


def test_with_one_decay_for_all_channels_they_are_one_rule():
    x = RULES[0].inputs(2, 100, 2, 16, 8)._replace(initial_bhpn=state(2, 2, 8, 16), doc_ids_bt=documents(2, 100))
    for found, expected in zip(
        channel.channel_delta_rule(*x._replace(log_decay_bth=RULES[0].log_decay_bthn(x))),
        gated.gated_delta_rule(*x),
        strict=True,
    ):
        assert_close(found, expected)


def test_the_inverse_is_that_of_the_triangle():
    lower = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1) * 0.3
    identity = torch.eye(32, dtype=torch.float64)
    assert_close(inverse_of(lower) @ (identity + lower), identity.expand(3, -1, -1))


def test_another_implementation_agrees():
    """That of Hugging Face's Qwen3-Next, which scales queries by 1 / sqrt(n) and keeps states as [n, p]."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x, initial = RULES[0].inputs(2, 100, 2, 16, 8, torch.float32), state(2, 2, 8, 16).float()
    expected, last = qwen.torch_recurrent_gated_delta_rule(
        x.q_bthn * 4, x.k_bthn, x.v_bthp, x.log_decay_bth, x.beta_bth, initial.mT, output_final_state=True
    )
    y, final = gated.gated_delta_rule(*x[:5], initial)
    assert_close(y, expected)
    assert_close(final, last.mT)
