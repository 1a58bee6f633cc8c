"""The launches another library would make on a GPU that is not here, without running any.

The library is called as usual, on meta tensors, while Triton believes that the target's device is active. Whatever its
host code passes to a kernel is kept as a Launch; of an autotuned kernel, one for each configuration it would try.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.kernel_report.targets import Target
from kernels.gpu.launch import Launch


@contextmanager
def pretended(target: Target) -> Iterator[None]:
    """Triton's driver and torch.cuda answer as on one device of the target. Libraries ask once, when imported."""
    from triton.runtime.driver import driver

    properties = {"max_shared_mem": target.max_shared_bytes, "multiprocessor_count": target.processors}
    stand_in = SimpleNamespace(
        get_current_target=target.triton_target,
        utils=SimpleNamespace(get_device_properties=lambda index: properties),
    )
    capability = divmod(target.arch, 10) if isinstance(target.arch, int) else (9, 4)
    driver.set_active(stand_in)
    with (
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_device_name", return_value=target.device),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        yield


@contextmanager
def recorded(target: Target) -> Iterator[list[list[Launch]]]:
    """Kernels called within are not run but listed, in order: each with the configurations it would be tried in."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    calls: list[list[Launch]] = []
    tuned: list[list[Launch]] = []  # the call whose configurations are being visited, if any

    def run_all_configs(tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        tuned.append([])
        for config in tuner.prune_configs(kwargs):
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        calls.append(tuned.pop())

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = as_launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, grid, target)
        if tuned:
            tuned[-1].append(launch)
        else:
            calls.append([launch])

    with mock.patch.object(Autotuner, "run", run_all_configs), mock.patch.object(JITFunction, "run", record):
        yield calls


def as_launch(kernel: Any, given: dict[str, Any], grid: Any, target: Target) -> Launch:
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr and p.name in given}
    args = {p.name: given[p.name] for p in kernel.params if not p.is_constexpr and p.name in given}
    stages = given.get("num_stages") or (3 if target.backend == "cuda" else 2)  # Triton's own defaults
    return Launch(
        kernel,
        tuple(grid(given) if callable(grid) else grid),
        args,
        constants,
        num_warps=given.get("num_warps") or 4,
        num_stages=stages,
        bytes=operand_bytes(args),
    )


def operand_bytes(args: dict[str, Any]) -> int:
    """Every tensor argument moved once: the least traffic a launch can have."""
    return sum(x.numel() * x.element_size() for x in args.values() if isinstance(x, torch.Tensor))
