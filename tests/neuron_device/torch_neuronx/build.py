"""Compile device.cpp once for each version of it and of torch, about a minute, into the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

NAME = "simulated_neuron"
_SOURCE = Path(__file__).parent / "device.cpp"


def load() -> ModuleType:
    """The compiled module. Raises: CalledProcessError: it does not compile."""
    library = built_library()
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_library() -> Path:
    """Its path; compiles it if it is not there."""
    command = _command()
    identity = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {command}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("BMOJO_CACHE_DIR", Path.home() / ".cache" / "bmojo"))
    library = cache / f"{NAME}-{identity}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            subprocess.run([*command, "-o", str(made)], check=True)
            made.replace(library)  # at once: several processes may compile it
    return library


def _command() -> list[str]:
    includes = [*include_paths(), sysconfig.get_path("include")]
    return [
        "g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(_SOURCE),
        *(f"-I{path}" for path in includes),
        *(f"-L{path}" for path in library_paths()),
        *(f"-Wl,-rpath,{path}" for path in library_paths()),
        "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python",
    ]  # fmt: skip
