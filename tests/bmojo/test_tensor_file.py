"""Files written tensor by tensor are those of the safetensors library."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from bmojo.tensor_file import TensorFile, TensorSpec, save_tensors

DTYPES = [
    torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype, out of order, with shapes of 0 to 3 axes, one without elements and one that is not contiguous."""
    found = {f"b.{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}
    found |= {f"a.{dtype}": torch.ones(5, dtype=dtype) for dtype in reversed(DTYPES)}
    return found | {
        "scalar": torch.tensor(1.5),
        "ü": torch.zeros(2, 0, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "w": torch.zeros(1, 2, 3),
    }


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    written = save_tensors(tensors(), file)
    plain = {name: tensor.contiguous() for name, tensor in tensors().items()}
    assert file.read_bytes() == save(plain, metadata={"format": "pt"})
    assert written == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())


def test_only_the_tensor_that_comes_next_is_taken(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x", {"b": TensorSpec((2,)), "a": TensorSpec((3,))})
    assert file.names == ["a", "b"]
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(2)), ("a", torch.zeros(3, dtype=torch.float16))):
        with pytest.raises(ValueError, match=f"{name} as .* is not the tensor that comes next"):
            file.write(name, tensor)
    file.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="b was not written"):
        file.close()
    file.write("b", torch.ones(2))
    file.close()
    assert load_file(tmp_path / "x")["b"].tolist() == [1, 1]
