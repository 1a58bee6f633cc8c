"""Peaks and meters."""

from __future__ import annotations

import time

import pytest
import torch

from pipelines.stages.train.throughput import Meter, known_peak, measure_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Quadro X", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_measured_peak_is_within_what_a_core_can_do() -> None:
    assert 1e8 < measure_peak(CPU, torch.float32) < 1e13


def test_meter_counts_only_time_inside_steps() -> None:
    meter = Meter(flops_per_token=10.0, peak_flops=1e6, device=CPU)
    for _ in range(2):
        meter.start_step()
        time.sleep(0.02)
        meter.end_step(100)
        time.sleep(0.1)  # validation
    tokens_per_s, mfu = meter.take()
    assert 200 / 0.1 < tokens_per_s <= 200 / 0.04
    assert mfu == pytest.approx(tokens_per_s * 10.0 / 1e6)
    assert meter.take() == (0.0, 0.0)
    assert meter.total_time_s >= 0.04
