"""What is measured of a machine is kept: plans depend on the machine, not on the moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bmojo.counting import count
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.planning import calibration
from pipelines.stages.train.planning.calibration import CorePeak, ProcessMemory
from pipelines.stages.train.planning.steps import Steps

MIB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("content", [None, "", "nonsense", "[]", "NaN", '{"flops": 1e30}', '{"flops": -1}'])
def test_the_best_peak_is_kept_and_damage_is_measured_again(cache: Path, content: str | None) -> None:
    first = calibration.core_peak()
    (file,) = cache.rglob("core-peak.json")
    assert torch.__version__.split("+")[0] in file.parent.name
    assert CorePeak.model_validate_json(file.read_text()).flops == first
    if content is None:
        assert {calibration.core_peak() for _ in range(10)} == {first}
    else:
        file.write_text(content)
        assert 1e8 < calibration.core_peak() < calibration.MOST_CORE_FLOPS


def test_a_process_is_told_apart_from_its_activations(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    states, holes = 0, 1.25

    def measured(train: TrainStageConfig, seq_len: int, first_rows: int | None = None) -> Steps:
        nonlocal states
        asked.append(first_rows)
        states = 3 * 4 * count(train.model, seq_len).num_params  # parameters and two moments
        few, many = (
            calibration.activations(train.model, rows, seq_len, "cpu", False, train.activation_checkpointing).peak
            for rows in (first_rows or 0, train.micro_batch_size)
        )
        return Steps(
            step_s=1, start_bytes=0, num_workers=1, first_peak_bytes=int(700 * MIB + states + holes * few),
            peak_bytes=int(700 * MIB + states + holes * many),
        )  # fmt: skip

    monkeypatch.setattr(calibration, "measure", measured)
    found = calibration.process_memory()
    assert found.per_activation_byte == pytest.approx(1.25, rel=1e-4)
    assert found.base_bytes == pytest.approx(700 * MIB, rel=1e-3)
    assert calibration.process_memory() == found
    assert len(asked) == 1
    calibration.process_memory(measure_again=True)
    assert len(asked) == 2
    assert ProcessMemory.model_validate_json(next(cache.rglob("process-memory-none.json")).read_text()) == found
    holes = 1.8
    assert calibration.process_memory("block").per_activation_byte == pytest.approx(1.8, rel=1e-4)
    assert calibration.process_memory() == found, "each has its own"
    assert len(asked) == 3
