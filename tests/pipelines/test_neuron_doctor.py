"""`bmojo doctor --neuron`: every step on the simulated device, and what failures say."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pipelines import neuron_doctor
from pipelines.doctor import Check
from pipelines.neuron_doctor import STEPS, ProbeSpec, run_first_hour
from tests.pipelines.stages.train.neuron_workers import ROOT, SIMULATED

TINY = ProbeSpec(
    d_model=32, num_heads=2, window_size=32, chunk_size=16, num_eidetic=8, d_state=16, ssm_head_dim=16, vocab_size=64,
    seq_len=64, num_steps=4,
)  # fmt: skip


def test_without_the_package_it_says_what_to_install() -> None:
    (check,) = run_first_hour()
    assert (check.name, check.verdict) == ("TorchNeuron", "error")
    assert "pip install -r requirements/neuron.txt" in check.advice


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
    assert [check.name for check in checks] == ["TorchNeuron", *(step.name for step in STEPS)]
    assert {check.name: check.found for check in checks if check.verdict != "ok"} == {}
