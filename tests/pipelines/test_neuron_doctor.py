"""`bmojo doctor --neuron`: every step on the simulated device, and what failures say."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import neuron_doctor
from pipelines.doctor import Check
from pipelines.neuron.checks import report
from pipelines.neuron.checks.lowering import Lowered, LoweringError
from pipelines.neuron_doctor import GRAPHS, STEPS, ProbeSpec, run_first_hour
from tests.pipelines.neuron.planted import FAULTS, planted
from tests.pipelines.stages.train.neuron_workers import ROOT, SIMULATED

pytestmark = pytest.mark.ci

TINY = ProbeSpec(
    d_model=32, num_heads=2, window_size=32, chunk_size=16, num_eidetic=8, d_state=16, ssm_head_dim=16, vocab_size=64,
    seq_len=64, num_steps=4,
)  # fmt: skip


@pytest.fixture
def no_torch_mlir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "PYTHON", tmp_path / "python")


def test_without_the_package_graphs_are_read_and_it_says_what_to_install(no_torch_mlir: None) -> None:
    graphs, package = run_first_hour(TINY)
    assert (graphs.name, graphs.verdict) == ("graphs of one block", "ok")
    assert graphs.found.startswith("4 graphs of ")
    assert graphs.found.endswith("not lowered")
    assert "make neuron-checks" in graphs.advice
    assert (package.name, package.verdict) == ("TorchNeuron", "error")
    assert "pip install -r requirements/neuron.txt" in package.advice


def test_a_graph_that_a_compiler_refuses_is_named(no_torch_mlir: None) -> None:
    with planted(FAULTS["deny list"]):
        check = next(run_first_hour(TINY))
    assert check.verdict == "error"
    assert "aten.cumprod.default" in check.found
    assert "op_table.toml" in check.advice


def test_a_part_that_is_not_one_graph_is_named(no_torch_mlir: None) -> None:
    with planted(FAULTS["graph break"]):
        check = next(run_first_hour(TINY))
    assert check.verdict == "error"
    assert "Unsupported" in check.found
    assert "constraints.txt" in check.advice


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Lowered("bmojo forward", "float32", 9, 0.1, 5000, 1e-6), None),
        (Lowered("bmojo forward", "float32", 9, 0.1, 5000, 0.5), "bmojo forward in float32: XLA's CPU is 5.0e-01 away"),
        (Lowered("bmojo forward", "bfloat16", 9, 0.1, failure="no"), "bmojo forward in bfloat16 does not lower: no"),
        (LoweringError("the process ended with -11"), "the process ended with -11"),
    ],
)
def test_what_torch_mlir_and_xla_say_is_told(
    answer: Lowered | LoweringError, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(*given: Any, **settings: Any) -> list[Lowered]:
        if isinstance(answer, LoweringError):
            raise answer
        return [answer]

    monkeypatch.setattr(report, "lower", lower)
    monkeypatch.setattr(report, "PYTHON", Path(sys.executable))
    check = next(run_first_hour(TINY))
    assert check.verdict == ("ok" if problem is None else "error")
    assert (problem or "StableHLO 5 kB, XLA's CPU within 1e-06 of torch") in check.found


def step(name: str, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(neuron_doctor, "_run", lambda step, spec: found)
    return neuron_doctor._check(next(each for each in STEPS if each.name == name), TINY)


GOOD = {"loss": 0.0, "fp32": 1e-6, "fp32_name": "a", "bf16": 1e-2, "bf16_name": "b", "three": 1e-6}
SPEED = {"tokens_per_s": 1e4, "first_loss": 4.0, "last_loss": 3.0, "graphs_after_warm_up": 0}


@pytest.mark.parametrize(
    ("name", "found", "problem"),
    [
        ("numerics against the CPU", GOOD, None),
        ("numerics against the CPU", GOOD | {"three": 0.4}, "three above 0.001"),
        ("numerics against the CPU", GOOD | {"bf16": float("nan")}, "bf16 above 0.05"),
        ("throughput of 20 steps", SPEED, None),
        ("throughput of 20 steps", SPEED | {"last_loss": 4.0}, "the loss of the same batch did not fall"),
        ("throughput of 20 steps", SPEED | {"graphs_after_warm_up": 2}, "graphs were compiled again"),
        ("all-reduce on two cores", {"num_ranks": 2, "is_right": False}, "a sum is wrong"),
        ("compile one block", {"first_s": 9.0, "then_s": 0.1, "fallback": ["aten::sort"]}, "host's CPU: aten::sort"),
    ],
)
def test_a_step_judges_what_it_found(
    name: str, found: dict[str, Any], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = step(name, found, monkeypatch)
    assert check.verdict == ("ok" if problem is None else "error")
    if problem is not None:
        assert problem in check.found
        assert check.advice


@pytest.mark.slow
def test_every_step_runs_on_the_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.neuron import runtime

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(SIMULATED)]))
    monkeypatch.setattr(runtime, "require", lambda: None)
    monkeypatch.setattr(runtime, "version", lambda: "2.14.3.0")
    checks = list(run_first_hour(TINY))
    assert [check.name for check in checks] == [GRAPHS, "TorchNeuron", *(step.name for step in STEPS)]
    assert {check.name: check.found for check in checks if check.verdict != "ok"} == {}
