"""Peaks, random generators, and that no other module asks about the device."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import UserError
from pipelines.stages.train import device

PIPELINES = Path(device.__file__).resolve().parents[2]


def test_measured_peak_is_within_what_a_core_can_do() -> None:
    assert 1e8 < device.measure_peak(device.CPU, size=256, duration_s=0.1) < 1e13


def test_peak_of_a_cpu_is_measured_whatever_the_precision(
    single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "measure_peak", lambda *_, **__: 1e10)
    peaks = device.peaks(device.CPU, autocast_bf16=True)
    assert (peaks.data_sheet, peaks.measured, peaks.of_mfu) == (None, 1e10, 1e10)


@pytest.mark.parametrize(("sheet", "of_mfu"), [(989e12, 989e12), (None, None)])
def test_a_gpu_in_bfloat16_has_both_peaks(
    single_process: None, monkeypatch: pytest.MonkeyPatch, sheet: float | None, of_mfu: float | None
) -> None:
    class Gpu:
        type = "cuda"

    measured = []
    monkeypatch.setattr(device, "measure_peak", lambda *_, dtype, **__: measured.append(dtype) or 7e14)
    monkeypatch.setattr(device, "known_peak", lambda _: sheet)
    monkeypatch.setattr(device, "name_of", lambda _: "a GPU")
    as_cpu = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *values, **options: as_cpu(*values, **options | {"device": "cpu"}))
    peaks = device.peaks(Gpu(), autocast_bf16=True)  # type: ignore[arg-type]  # what is asked of a device
    assert measured == [torch.bfloat16]
    assert (peaks.data_sheet, peaks.measured, peaks.of_mfu) == (sheet, 7e14, of_mfu)


def test_random_generators_continue_where_they_were() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), random.random(), float(np.random.normal()), float(torch.randn(()))

    device.seed_everything(7)
    draw()
    saved = device.rng_state(device.CPU)
    expected = [draw() for _ in range(5)]
    device.seed_everything(8)
    device.set_rng_state(saved, device.CPU)
    assert [draw() for _ in range(5)] == expected


def test_a_device_without_memory_is_the_users_error_with_a_remedy() -> None:
    told = r"^A GPU ran out of memory: Tried to allocate 2 GiB\. Lower it\.$"
    with pytest.raises(UserError, match=told), device.explained_memory("Lower it."):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nMore.")


def test_only_these_modules_ask_torch_about_devices() -> None:
    asking = re.compile(r"torch\.(cuda|accelerator|get_device_module)|\"cuda\"")
    files = {
        file.relative_to(PIPELINES).as_posix() for file in PIPELINES.rglob("*.py") if asking.search(file.read_text())
    }
    assert files == {"neuron/runtime.py", "stages/train/device.py"}
