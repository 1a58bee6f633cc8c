"""Achieved speed: tokens per second, and model FLOP/s as a share of what the devices' matrix products reach (MFU)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Dense matrix-product peaks by words of the device's name, in FLOP/s (vendors' data sheets, without sparsity).
# The first entry whose words are all in the name counts: a variant comes before its family.
_BF16_PEAKS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "MI300X": 1307e12,
    "L40S": 362e12,
}
_MEASURE_SIZE = 768
_MEASURE_S = 0.4


def peak_flops(device: torch.device, autocast_bf16: bool) -> float:
    """Peak matrix-product FLOP/s of all workers together. A collective.

    A GPU known by name has its data-sheet peak in bfloat16. Everything else is measured: float32 products on every
    rank at the same time, with the threads that training has, so that shared memory bandwidth and clocks count.
    """
    local = known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" and autocast_bf16 else None
    if local is None:
        dist.barrier()
        local = measure_peak(device, torch.bfloat16 if autocast_bf16 and device.type == "cuda" else torch.float32)
    total = torch.tensor(local, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def known_peak(device_name: str) -> float | None:
    """bfloat16 peak of a GPU by its name; None where the name is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    return next((peak for name, peak in _BF16_PEAKS.items() if words.issuperset(name.split())), None)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this device: the best of what fits into less than a second."""
    size = _MEASURE_SIZE if device.type == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    best_s = float("inf")
    end = time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return float(2 * size**3 / best_s)


@dataclass
class Meter:
    """Tokens and seconds of training steps; validation and checkpoints do not count."""

    flops_per_token: float
    peak_flops: float
    device: torch.device
    total_time_s: float = 0.0
    _tokens: int = 0
    _time_s: float = 0.0
    _start: float | None = None

    def start_step(self) -> None:
        """The clock runs from here."""
        self._start = time.perf_counter()

    def end_step(self, num_tokens: int) -> None:
        """The clock stops; `num_tokens` were trained on by all workers together."""
        assert self._start is not None, "end_step without start_step"
        _synchronize(self.device)
        elapsed_s = time.perf_counter() - self._start
        self._time_s += elapsed_s
        self.total_time_s += elapsed_s
        self._tokens += num_tokens

    def take(self) -> tuple[float, float]:
        """(tokens per second, MFU) since the last call."""
        tokens_per_s = self._tokens / self._time_s if self._time_s else 0.0
        self._tokens, self._time_s = 0, 0.0
        return tokens_per_s, self.mfu(tokens_per_s)

    def mfu(self, tokens_per_s: float) -> float:
        """Share of the peak that `tokens_per_s` amounts to."""
        return tokens_per_s * self.flops_per_token / self.peak_flops


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
