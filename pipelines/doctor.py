"""Checks of the environment that `bmojo doctor` prints: what was found, whether it will do, and what to do if not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil

import bmojo
import data
import kernels
from pipelines.tracking.config import SINKS
from pipelines.tracking.sink import Target

GIB = 2**30
Verdict = Literal["ok", "warning", "error"]

# The versions tested together are in constraints.txt; these are what a run cannot do without.
REQUIRED = (
    "torch",
    "ray",
    "deepspeed",
    "mlflow",
    "pydantic",
    "tokenizers",
    "tiktoken",
)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def run_checks(storage: str = ".") -> Iterator[Check]:
    """All checks in the order they are shown; none of them changes anything but the cache of compiled kernels."""
    yield _python()
    yield from _packages()
    yield _torch_works()
    yield _shadowed_packages()
    yield _cpp_kernels()
    yield _devices()
    yield _operators()
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _disk(storage)
    yield _loopback()
    for sink in SINKS:
        yield _tracker_works(sink.target_type)
    yield _ui_port()


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    tested = sys.version_info[:2] == (3, 11)
    return Check("Python", "ok" if tested else "warning", found, "" if tested else "Tested with CPython 3.11 only.")


def _packages() -> Iterator[Check]:
    tested = _tested_versions()
    for name in REQUIRED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "error", "not installed", "Run `make install`.")
            continue
        expected = tested.get(name)
        if expected and version.split("+")[0] != expected:
            yield Check(name, "warning", version, f"Tested with {expected}: `make install` brings it.")
        else:
            yield Check(name, "ok", version)


def _tested_versions() -> dict[str, str]:
    file = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not file.exists():
        return {}
    pins = (line.split("==") for line in file.read_text().splitlines() if "==" in line)
    return {name.strip(): version.strip() for name, version in pins}


def _torch_works() -> Check:
    try:
        import torch
    except Exception as error:
        return Check(
            "torch",
            "error",
            f"{type(error).__name__}: {error}",
            "Install it again: `make install`.",
        )
    return Check("torch", "ok", f"import; {torch.get_num_threads()} threads")


def _shadowed_packages() -> Check:
    """`kernels` and `data` are plain names: another distribution or folder so named may be imported."""
    root = Path(__file__).resolve().parent.parent
    strays = [
        f"{module.__name__} comes from {module.__file__}"
        for module in (bmojo, data, kernels)
        if root not in Path(str(module.__file__)).resolve().parents
    ]
    if strays:
        return Check(
            "our packages", "error", "; ".join(strays), "Run from the checkout, in its own virtual environment."
        )
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return Check("our packages", "ok", f"from {root}")
    return Check(
        "our packages",
        "warning",
        f"the PyPI distribution `kernels` {version} is installed beside ours",
        "The two share an import name: `pip uninstall kernels`, or use a virtual environment of its own.",
    )


def _cpp_kernels() -> Check:
    from kernels.cpp import library

    try:
        return Check("C++ kernels", "ok", f"compiled for this processor: {library.load()._name}")
    except library.CANNOT_LOAD as error:
        reason, *details = str(error).splitlines()
        advice = (
            "Without them operators run as plain torch, slower on the CPU. They need g++ (`apt install g++`) and a "
        )
        advice += "cache folder to write to and load from: $BMOJO_CACHE_DIR, by default ~/.cache/bmojo."
        return Check("C++ kernels", "warning", reason, "\n".join([*details, advice]))


def _devices() -> Check:
    from pipelines.stages.train import device

    if names := device.gpu_names():
        return Check("accelerators", "ok", ", ".join(names))
    return Check("accelerators", "ok", "none: training runs on the CPU (gloo, float32)")


def _operators() -> Check:
    """The path of each operator for float32 on this machine, and why those without a kernel run as plain torch."""
    from kernels.overview import planned

    try:
        choices = planned()
    except (ValueError, RuntimeError, OSError) as error:  # what BMOJO_KERNELS asks for cannot run here
        return Check("operators", "error", str(error))
    paths = sorted({choice.path for choice in choices})
    found = "; ".join(f"{path}: {', '.join(c.operator for c in choices if c.path == path)}" for path in paths)
    plain = "\n".join(f"{choice.operator} on torch: {choice.reason}" for choice in choices if choice.path == "torch")
    return Check("operators", "ok", found, plain)


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return Check(
        "CPU cores",
        "ok" if cores >= 2 else "warning",
        str(cores),
        "" if cores >= 2 else "The quickstart is made for 2 cores.",
    )


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if memory.available < 4 * GIB:
        return Check(
            "memory", "warning", found, "The quickstart uses about 4 GiB; Ray kills tasks when memory runs out."
        )
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check("shared memory", "ok", "no /dev/shm on this system")
    free = shutil.disk_usage("/dev/shm").free
    if free < GIB:
        return Check(
            "shared memory",
            "warning",
            f"{free / GIB:.2f} GiB free in /dev/shm",
            "Ray and the data loaders use it. In Docker: --shm-size=4g.",
        )
    return Check("shared memory", "ok", f"{free / GIB:.1f} GiB free in /dev/shm")


def _disk(storage: str) -> Check:
    if "://" in storage:
        return Check("storage", "ok", f"{storage} (checked when a run starts)")
    folder = Path(storage).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("storage", "error", f"{folder}: {error.strerror}", "Set `storage` to a folder you may write to.")
    free = shutil.disk_usage(folder).free
    return Check(
        "storage",
        "ok" if free > 5 * GIB else "warning",
        f"{free / GIB:.0f} GiB free at {folder}",
        "" if free > 5 * GIB else "Checkpoints and Ray's logs need room: free some, or set `storage` elsewhere.",
    )


def _loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Check("loopback", "ok", "127.0.0.1 can be bound")
    except OSError as error:
        return Check("loopback", "error", str(error), "Ray, gloo and MLflow talk over 127.0.0.1: allow it.")


def _tracker_works(target: type[Target]) -> Check:
    is_required = target.package in REQUIRED
    try:
        package = importlib.import_module(target.package)
    except Exception as error:  # whatever a half-installed package raises
        if not is_required and find_spec(target.package) is None:
            return Check(target.name, "ok", f"not installed; only a tracker of that kind needs {target.package}")
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Check(
            target.name,
            "error" if is_required else "warning",
            found,
            "Runs are tracked with it: `make install` brings a version that imports.",
        )
    return Check(target.name, "ok", f"imports; {package.__version__}")


def _ui_port(port: int = 5000) -> Check:
    """The port of `bmojo ui`."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Check("port of bmojo ui", "ok", f"{port} is free")
    except OSError as error:
        return Check("port of bmojo ui", "warning", f"{port}: {error.strerror}", "Choose another one: bmojo ui --port.")
