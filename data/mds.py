"""Shards in the MDS format of mosaicml-streaming: a writer and a reader of samples of arrays.

A shard file holds, all integers little-endian:

    number of samples n: uint32 | offset of each sample, and of the end: (n + 1) x uint32 | columns as JSON | samples

A sample holds the sizes of its columns (uint32 each, in the order of their names), then their bytes. An array stands
behind its shape, of one dimension here. Files are byte for byte those of the library, and each opens what the other
wrote, which tests/data/test_mds.py checks. Why not the library itself: docs/design/0014-own-reader-of-mds.md.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from base.errors import DamagedError
from data.records import ShardEntry

_UINT32 = np.dtype("<u4")
_SHAPE_DTYPES = tuple(map(np.dtype, ("<u1", "<u2", "<u4", "<u8")))
_SHAPE_LIMITS = tuple(int(np.iinfo(dtype).max) for dtype in _SHAPE_DTYPES)
_ARRAY = "ndarray:"
BYTES = "bytes"


def array_of(dtype: str) -> str:
    """The encoding of a column of one-dimensional arrays, such as `ndarray:uint16`."""
    return f"{_ARRAY}{dtype}"


def index_entry(entry: ShardEntry, columns: Mapping[str, str], shard_bytes: int) -> dict[str, Any]:
    """The shard's entry in an index.json that mosaicml-streaming reads."""
    raw = {"basename": entry.name, "bytes": entry.num_bytes, "hashes": {"sha256": entry.sha256}}
    return {"samples": entry.num_samples, "raw_data": raw, "zip_data": None, **_config(columns, shard_bytes)}


def _config(columns: Mapping[str, str], shard_bytes: int) -> dict[str, Any]:
    names = sorted(columns)
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": shard_bytes,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [None] * len(names),
    }


class MdsWriter:
    """Writes samples to shard.00000.mds, shard.00001.mds, ... in a folder, which is made for the first.

    Args:
        columns: encoding of each column: `bytes`, or `array_of(dtype)`.
        shard_bytes: largest shard file; a single sample may exceed it.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str], shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._encodings = [columns[name] for name in sorted(columns)]
        self._names = sorted(columns)
        self._sizes = struct.Struct(f"<{len(columns)}I")
        self._header = json.dumps(_config(columns, shard_bytes), sort_keys=True).encode()
        self._samples: list[bytes] = []
        self._num_bytes = self._bytes_of_none
        self.entries: list[ShardEntry] = []

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample: bytes or a one-dimensional array, not empty, for each column."""
        values = [_encode(sample[name], encoding) for name, encoding in zip(self._names, self._encodings, strict=True)]
        data = b"".join([self._sizes.pack(*map(len, values)), *values])
        num_bytes = len(data) + _UINT32.itemsize
        if self._samples and self._num_bytes + num_bytes > self._shard_bytes:
            self._flush()
        self._samples.append(data)
        self._num_bytes += num_bytes

    def finish(self) -> tuple[ShardEntry, ...]:
        """Write the last shard. Returns the entries of all, their names relative to the folder."""
        if self._samples:
            self._flush()
        return tuple(self.entries)

    @property
    def _bytes_of_none(self) -> int:
        return 2 * _UINT32.itemsize + len(self._header)

    def _flush(self) -> None:
        num_samples = len(self._samples)
        sizes = np.fromiter(map(len, self._samples), np.int64, num_samples)
        first = _UINT32.itemsize * (num_samples + 2) + len(self._header)
        offsets = (first + np.concatenate(([0], sizes.cumsum()))).astype(_UINT32)
        name = f"shard.{len(self.entries):05d}.mds"
        self._folder.mkdir(parents=True, exist_ok=True)
        digest, num_bytes = hashlib.sha256(), 0
        with open(self._folder / name, "xb") as file:
            for part in (_UINT32.type(num_samples).tobytes(), offsets.tobytes(), self._header, *self._samples):
                file.write(part)
                digest.update(part)
                num_bytes += len(part)
        self.entries.append(ShardEntry(name, num_samples, num_bytes, digest.hexdigest()))
        self._samples, self._num_bytes = [], self._bytes_of_none


def _encode(value: Any, encoding: str) -> bytes:
    if encoding == BYTES:
        return bytes(value)
    array: np.ndarray = np.ascontiguousarray(value, np.dtype(encoding.removeprefix(_ARRAY)).newbyteorder("<"))
    kind = bisect_left(_SHAPE_LIMITS, len(array))
    return bytes([1 << 2 | kind]) + len(array).to_bytes(_SHAPE_DTYPES[kind].itemsize, "little") + array.tobytes()


class MdsShard:
    """An open shard file, mapped into memory: samples are read where they stand, without a copy.

    Raises: DamagedError: the file is no such shard.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._name = file.name
        try:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            (self.num_samples,) = np.frombuffer(self._map, _UINT32, 1).tolist()
            self._offsets = np.frombuffer(self._map, _UINT32, self.num_samples + 1, _UINT32.itemsize)
            header = self._map[_UINT32.itemsize * (self.num_samples + 2) : int(self._offsets[0])]
            columns = json.loads(header)
            self._columns = list(zip(columns["column_names"], columns["column_encodings"], strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{self._name}: not a shard in the MDS format") from error

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Columns of the sample: arrays of their dtype, bytes as uint8; valid as long as they are held."""
        position = int(self._offsets[index])
        sizes = np.frombuffer(self._map, _UINT32, len(self._columns), position).tolist()
        position += _UINT32.itemsize * len(sizes)
        values = {}
        for (name, encoding), size in zip(self._columns, sizes, strict=True):
            values[name] = self._decode(encoding, position, size)
            position += size
        return values

    def _decode(self, encoding: str, position: int, size: int) -> np.ndarray:
        if encoding == BYTES:
            return np.frombuffer(self._map, np.uint8, size, position)
        kind = self._map[position] & 3
        skipped = 1 + _SHAPE_DTYPES[kind].itemsize
        dtype = np.dtype(encoding.removeprefix(_ARRAY)).newbyteorder("<")
        return np.frombuffer(self._map, dtype, (size - skipped) // dtype.itemsize, position + skipped)
