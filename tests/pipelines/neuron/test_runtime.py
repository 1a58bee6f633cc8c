"""What is said where TorchNeuron is missing or another one; and that one module asks for it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pipelines.neuron import runtime

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            None,
            r"needs torch-neuronx 2\.14.*not on PyPI: pip install -r requirements/neuron\.txt.*device: cpu",
        ),
        ("1.0", r"torch-neuronx 1\.0 is PyPI's placeholder\. pip uninstall torch-neuronx neuronx-cc nki, then"),
        ("2.9.0.2", r"2\.9\.0\.2 is the library on XLA"),
        ("2.13.3.0", r"2\.13\.3\.0 is built for PyTorch 2\.13; found torch 2\.14"),
        ("2.14.3.0", r"2\.14\.3\.0 is installed and cannot be imported \(ImportError: WRONG PACKAGE"),
    ],
)
def test_a_missing_or_another_package_says_what_to_do(
    version: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(torch, "__version__", "2.14.1+cpu")
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    (tmp_path / "torch_neuronx.py").write_text("raise ImportError('WRONG PACKAGE')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(runtime.NeuronUnavailableError, match=expected):
        runtime.require()


def test_the_package_for_this_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("torch_neuronx")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.3.0")
    monkeypatch.setitem(sys.modules, "torch_neuronx", package)
    assert runtime.require() is package
    assert runtime.fallback_ops() == []
    assert runtime.memory_allocated() == (0, 0)


def test_cores_are_those_that_neuron_ls_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.num_cores() == 0
    program = tmp_path / "neuron-ls"
    program.write_text('#!/bin/sh\necho \'[{"nc_count": 4}, {"nc_count": 4}]\'\n')
    program.chmod(0o755)
    assert runtime.num_cores() == 8


def test_one_module_imports_torch_neuronx() -> None:
    packages = ("base", "kernels", "bmojo", "data", "pipelines")
    asking = [
        str(file.relative_to(ROOT))
        for package in packages
        for file in (ROOT / package).rglob("*.py")
        if '"torch_neuronx"' in (text := file.read_text()) or "import torch_neuronx" in text
    ]
    assert asking == ["pipelines/neuron/runtime.py"]


def test_aws_packages_are_asked_of_their_own_index_only() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert not any(name in project for name in ("torch-neuronx", "neuronx-cc", "libneuronxla"))
    asked = (ROOT / "requirements" / "neuron.txt").read_text()
    assert f"--extra-index-url {runtime.INDEX}" in asked
    assert "torch-neuronx==2.14.*" in asked


def test_moving_a_model_keeps_its_weights_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("table", torch.ones(2))

    model = Tied()
    runtime.move(model, torch.device("meta"))
    assert model.head.weight is model.embedding.weight
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
