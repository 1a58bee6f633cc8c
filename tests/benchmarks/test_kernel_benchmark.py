"""All of the benchmark of kernels but its timing: the gate, the peers' adapters, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import _kernel_cases as kernel_cases
from benchmarks import kernels as benchmark
from benchmarks._kernel_cases import TINY, cases
from benchmarks.kernels import Measurement
from kernels.operator import check_request, use

OPERATORS = ["causal_conv1d", "ssd_scan", "memory_attention", "innovation_select"]
WHERE = {"date": "2026-01-02", "device": "H100", "torch": "2"}


def tiny(operator: str, dtype: torch.dtype = torch.float32) -> list[kernel_cases.Case]:
    return [case for case in cases(TINY, "cpu", dtype, compiled=False) if case.operator == operator]


@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]])
def test_without_a_gpu_it_says_so_and_what_else_there_is(arguments, capsys):
    assert benchmark.main(arguments) == 2
    assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gate_passes_in_tritons_interpreter(operator):
    assert benchmark.gate("cpu", TINY, [operator], compiled=False) == []


def test_the_gate_tells_of_a_wrong_output_and_a_wrong_gradient(monkeypatch):
    convolve = kernel_cases.causal_conv1d

    def slightly_off(x, weight):
        y, tail = convolve(x, weight)
        return (y * 1.1 if check_request(x) == "triton" else y), tail

    monkeypatch.setattr(kernel_cases, "causal_conv1d", slightly_off)
    wrong = benchmark.gate("cpu", TINY, ["causal_conv1d"], compiled=False)
    assert any("ours, output: relative error 0.1" in problem for problem in wrong)
    assert any("ours, gradient 2: relative error 0.1" in problem for problem in wrong)


def test_the_gate_tells_of_nan():
    assert not benchmark.relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_with_its_mask_computes_the_same_and_sdpa_runs():
    exact, slots = tiny("memory_attention")
    flex, sdpa = exact.peers
    with use("reference"):
        want = exact.ours.call(*exact.ours.leaves)
    assert benchmark.relative_error(benchmark._output(flex), want) < 1e-5
    assert not sdpa.exact
    assert sdpa.call(*sdpa.leaves).shape == want.shape
    assert [peer.exact for peer in slots.peers] == [False, False]


def test_the_scan_is_handed_to_simple_gla_in_its_terms():
    """As fla defines them: S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, with as many key as value heads."""
    (case,) = tiny("ssd_scan")
    x, dt, B, C = case.ours.leaves
    A = -torch.linspace(1, 16, x.shape[2])
    q, k, v, g = kernel_cases.fla_scan(x, dt, A, B, C).leaves
    state, outputs = torch.zeros(k.shape[0], *k.shape[2:], v.shape[3]), []
    for t in range(k.shape[1]):
        state = state * g[:, t, :, None, None].exp() + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    with use("reference"):
        want = case.ours.call(*case.ours.leaves)
    assert benchmark.relative_error(torch.stack(outputs, 1), want) < 1e-5


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_and_backward_are_what_would_be_timed(operator):
    with use("torch"):
        for case in tiny(operator):
            calls = benchmark.passes(case.ours, case.has_backward)
            assert list(calls) == (["forward", "backward"] if case.has_backward else ["forward"])
            for call in calls.values():
                call()
                call()


def test_results_are_written_as_ratios(tmp_path):
    (case,) = tiny("causal_conv1d")
    ours = benchmark.measurement(case, "forward", case.ours, [1.0, 1.0, 2.0])
    assert ours.median_ms == 1
    peer = replace(ours, implementation="fla", median_ms=1.5, note="other")
    markdown, document = benchmark.write(tmp_path, [ours, peer], WHERE)
    assert markdown.name == "kernels_2026-01-02.md"
    assert "| forward | fla | 1.500 | " in markdown.read_text()
    assert "| 1.50 | other |" in markdown.read_text()
    assert Measurement(**json.loads(document.read_text())["measurements"][0]) == ours
