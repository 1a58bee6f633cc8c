"""A whole training step on a registered `neuron` device without memory, and the faults that stop it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.ci
def test_a_step_of_all_mixers_passes_and_planted_faults_stop_it():
    """In one process of its own: torch's name for a new device can be given once."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.neuron.fake_steps"], capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == [
        "all mixers: neuron:0",
        "item: DataDependentOutputException",
        "boolean index: DynamicOutputShapeException",
        "cpu tensor: FakeTensorDeviceMismatchError",
    ], ended.stderr
