"""safetensors files written tensor by tensor, and hashed on the way.

The library's writer needs all tensors at once, copies them, and keeps Python's lock until the disk has them. This one
lets other threads run, and needs memory for one tensor. The files are the same to the last byte (tested).
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

# In the order of tensors in a file.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_WRITE_BYTES = 1 << 24


class TensorSpec(NamedTuple):
    """What must be known of a tensor before it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WrittenFile(NamedTuple):
    """A file as it was written."""

    size_bytes: int
    sha256: str


class TensorFile:
    """A file under construction. Tensors come one by one, in the order of `names`; then `close`."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        """Begin the file. Args: metadata: more of it than the format's name. Raises: OSError: see `write`."""
        places = list(_DTYPES)
        self.names = sorted(specs, key=lambda name: (places.index(specs[name].dtype), name))
        self._specs, self._path, self._next = specs, path, 0
        self._hash, self._size = hashlib.sha256(), 0
        path.unlink(missing_ok=True)
        self._file = path.open("xb", buffering=0)
        self._put(_header(self.names, specs, {"format": "pt", **(metadata or {})}))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor. Raises: OSError: the disk does not take it; it names the file."""
        if (
            self._next == len(self.names)
            or name != self.names[self._next]
            or TensorSpec.of(tensor) != self._specs[name]
        ):
            raise ValueError(f"{self._path}: {name} as {TensorSpec.of(tensor)} is not the tensor that comes next.")
        self._next += 1
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            for part in flat.split(_WRITE_BYTES):
                self._put(part.numpy().data)

    def close(self) -> WrittenFile:
        """Make the file durable. Raises: OSError: as in `write`."""
        if self._next != len(self.names):
            raise ValueError(f"{self._path}: {self.names[self._next]} was not written.")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._named(error) from error
        finally:
            self._file.close()
        return WrittenFile(self._size, self._hash.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        left = memoryview(data)
        try:
            while left.nbytes:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise self._named(error) from error
        self._size += len(data)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write a file of tensors that are there. Raises: OSError: the disk does not take it; it names the file."""
    file = TensorFile(path, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, metadata)
    for name in file.names:
        file.write(name, tensors[name])
    return file.close()


def _header(names: list[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        spec = specs[name]
        end = offset + spec.num_bytes
        entries[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
