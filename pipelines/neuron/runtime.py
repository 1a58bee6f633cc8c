"""TorchNeuron: the one module that imports torch_neuronx, which is never there unless AWS's repository was asked.

Written to AWS's documentation of SDK 2.33. It never ran on the hardware (docs/neuron.md). Nothing here is called where
a module is imported. Only `require` and what asks no device may be called before the process group is there: the
runtime starts with the first use of a device and must find its core in the environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from base.errors import UserError
from pipelines.neuron.environment import VISIBLE_CORES

PACKAGE = "torch-neuronx"
INDEX = "https://pip.repos.neuron.amazonaws.com"
TYPE = "neuron"
PROCESS_GROUP = f"cpu:gloo,{TYPE}:{TYPE}"
"""The host's numbers go by gloo: exact in 64 bits, without the device."""
_OLDEST = (2, 13)  # of the native line; what came before is built on XLA
_NEURON_LS = "/opt/aws/neuron/bin"


class NeuronUnavailableError(UserError):
    """TorchNeuron cannot be used here; the message says what to do."""


def require() -> ModuleType:
    """The package, imported; it registers the device.

    Raises: NeuronUnavailableError: it is missing, PyPI's placeholder, of the XLA line or for another torch.
    """
    if sys.platform != "linux":
        raise NeuronUnavailableError(f"backend.kind=neuron runs on Linux only; this is {sys.platform}.")
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise NeuronUnavailableError(
            f"backend.kind=neuron needs {PACKAGE} 2.14, which AWS publishes in a repository of its own, not on PyPI: "
            f"pip install -r requirements/neuron.txt, or: pip install --extra-index-url {INDEX} "
            f'"{PACKAGE}==2.14.*" (trn2 or trn3, Python 3.12 to 3.14; docs/neuron.md). To rehearse without the '
            "hardware, set backend.device: cpu."
        ) from None
    numbers = _numbers(version)
    if numbers < (2, 0):
        raise NeuronUnavailableError(
            f"the installed {PACKAGE} {version} is PyPI's placeholder. pip uninstall {PACKAGE} neuronx-cc nki, then "
            f"pip install -r requirements/neuron.txt, which asks {INDEX}."
        )
    if numbers < _OLDEST:
        raise NeuronUnavailableError(
            f"the installed {PACKAGE} {version} is the library on XLA; this needs the native one, 2.13 or newer: pip "
            "install -r requirements/neuron.txt."
        )
    if numbers != _numbers(torch.__version__):
        raise NeuronUnavailableError(
            f"{PACKAGE} {version} is built for PyTorch {numbers[0]}.{numbers[1]}; found torch {torch.__version__}. "
            "Install the two as one family: pip install -r requirements/neuron.txt."
        )
    try:
        return importlib.import_module("torch_neuronx")
    except Exception as error:  # whatever a package raises whose driver or compiler is missing
        raise NeuronUnavailableError(
            f"{PACKAGE} {version} is installed and cannot be imported ({type(error).__name__}: {error}). It needs the "
            "packages nki and neuronx-cc of the same repository, and the driver (aws-neuronx-dkms) on the host."
        ) from error


def version() -> str:
    """Of the installed package."""
    return importlib.metadata.version(PACKAGE)


def num_cores() -> int:
    """Logical NeuronCores of this machine by `neuron-ls`, as Ray counts them; 0 without that program."""
    program = shutil.which("neuron-ls", path=os.pathsep.join([os.environ.get("PATH", ""), _NEURON_LS]))
    if program is None:
        return 0
    listed = subprocess.run([program, "--json-output"], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        return 0
    return sum(int(device.get("nc_count", 0)) for device in json.loads(listed.stdout))


def device() -> torch.device:
    """The core of this process, once its process group is there.

    Raises: NeuronUnavailableError: there is none.
    """
    require()
    module = torch.get_device_module(TYPE)
    if not module.device_count():
        cores = os.environ.get(VISIBLE_CORES, "not set")
        raise NeuronUnavailableError(
            f"{PACKAGE} is installed, but no Neuron device is visible. Check that this is a trn2 or trn3 instance, "
            f"that neuron-ls lists a device, and that the cores of {VISIBLE_CORES} ({cores}) are free: a core belongs "
            "to one process until that process ends."
        )
    return torch.device(TYPE, module.current_device())


def compiler() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What makes one static graph of a function, for its forward and its backward; it compiles at the first call."""
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = partial(
        torch.compile, backend=TYPE, fullgraph=True, dynamic=False
    )
    return compile


def fallback_ops() -> list[str]:
    """Operators that ran on the host's CPU since the start; empty where the package does not say."""
    ask = getattr(require(), "get_fallback_ops", None)
    return sorted({str(name) for name in ask()}) if ask is not None else []


def memory_allocated() -> tuple[int, int]:
    """Bytes of the device that are held now, and the most so far; 0 where the package does not say."""
    package = require()
    found = [getattr(package, name, None) for name in ("memory_allocated", "max_memory_allocated")]
    now, most = (int(ask()) if ask is not None else 0 for ask in found)
    return now, most


def rng_state() -> torch.Tensor | None:
    """The state of the device's generator; None where it has none: random operators run on the CPU."""
    ask = getattr(torch.get_device_module(TYPE), "get_rng_state", None)
    return ask() if ask is not None else None


def set_rng_state(state: torch.Tensor) -> None:
    """Put it back."""
    put = getattr(torch.get_device_module(TYPE), "set_rng_state", None)
    if put is not None:
        put(state)


def move(module: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers, in place. Those that modules share stay shared.

    `Module.to` puts another parameter in the place of each one for this kind of device, and so parts tied weights.
    """
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                owner._parameters[name] = cast(nn.Parameter, moved[parameter])
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = moved.setdefault(buffer, buffer.to(device))


def synchronize() -> None:
    """Wait until the device has done what was asked of it."""
    torch.get_device_module(TYPE).synchronize()


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor."""
    parts: Sequence[str] = version.split(".")
    return int(parts[0]), int("".join(filter(str.isdigit, parts[1])) or 0)
