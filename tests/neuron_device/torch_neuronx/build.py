"""Compile device.cpp once for each version of it and of torch, about a minute, into the user's cache."""

from __future__ import annotations

import fcntl
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
    """Its path; compiles it if it is not there. Of several processes one compiles it, and the others wait."""
    command = _command()
    identity = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {command}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("BMOJO_CACHE_DIR", Path.home() / ".cache" / "bmojo"))
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{NAME}-{identity}.so"
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / library.name
                subprocess.run([*command, "-o", str(made)], check=True)
                made.replace(library)
    return library


def _command() -> list[str]:
    """By real paths: checkouts that share an environment share what it makes."""
    includes, libraries = (
        [str(Path(path).resolve()) for path in paths]
        for paths in ([*include_paths(), sysconfig.get_path("include")], library_paths())
    )
    return [
        "g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(_SOURCE),
        *(f"-I{path}" for path in includes),
        *(f"-L{path}" for path in libraries),
        *(f"-Wl,-rpath,{path}" for path in libraries),
        "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python",
    ]  # fmt: skip
