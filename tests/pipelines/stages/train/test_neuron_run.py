"""Training under Ray on the simulated device: killed and resumed, and beside DeepSpeed's on the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.pipelines.stages.train.neuron_workers import ROOT, SIMULATED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What neuron_driver saw, in a process and a cluster of its own."""
    folder = tmp_path_factory.mktemp("neuron")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SIMULATED)])}
    command = [sys.executable, "-m", "tests.pipelines.stages.train.neuron_driver", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    seen: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return seen


def losses(run: dict[str, Any]) -> dict[int, float]:
    """The last loss of each step: a killed training takes some twice."""
    return {step: loss for step, loss in run["losses"]}


def test_losses_are_those_of_deepspeed(found: dict[str, Any]) -> None:
    expected = losses(found["deepspeed"])
    assert list(expected) == list(range(1, 13))
    for run in ("neuron", "neuron by fsdp2", "neuron after deepspeed", "deepspeed after neuron"):
        assert losses(found[run]) == pytest.approx({step: expected[step] for step in losses(found[run])}, abs=1e-5)
        assert found[run]["valid"][-1][1] == pytest.approx(found["deepspeed"]["valid"][-1][1], abs=1e-5)


def test_it_ran_on_the_device_along_its_own_paths(found: dict[str, Any]) -> None:
    assert found["neuron"]["devices"] == "2 x logical NeuronCore (torch-neuronx 2.14.3.0)"
    paths = found["neuron"]["paths"]
    assert paths["bmojo.path.rotary_table"].startswith("static"), "of the operators outside compiled blocks"
    assert "NeuronCore" not in found["deepspeed"]["devices"]


def test_a_killed_worker_resumes_bitwise(found: dict[str, Any]) -> None:
    assert found["neuron"]["was_killed"]
    by_step: dict[int, set[float]] = {}
    for step, loss in found["neuron"]["losses"]:
        by_step.setdefault(step, set()).add(loss)
    assert [step for step, _ in found["neuron"]["losses"]] == [*range(1, 9), *range(1, 13)], "replayed, then on"
    assert all(len(seen) == 1 for seen in by_step.values()), "steps 7 and 8 were taken twice"


@pytest.mark.parametrize(("reader", "writer"), [("neuron", "deepspeed"), ("deepspeed", "neuron")])
def test_each_backend_resumes_the_others_checkpoint_with_its_moments(
    found: dict[str, Any], reader: str, writer: str
) -> None:
    (report,) = found[f"{reader} after {writer}"]["resumes"]
    assert report["written_by"]["backend"]["kind"] == writer
    assert report["read_by"]["backend"]["kind"] == reader
    assert report["compared"] == "digests of all elements"
    assert any(key.startswith("exp_avg_sq/") for key in report["digests"])
    assert [step for step, _ in found[f"{reader} after {writer}"]["losses"]] == list(range(1, 13))
