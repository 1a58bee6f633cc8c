"""Our shards beside mosaicml-streaming's: the same bytes, and each opens what the other wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DamagedError
from data.mds import BYTES, MdsShard, MdsWriter, array_of, index_entry

COLUMNS = {"tokens": array_of("uint16"), "doc_starts": BYTES}


def samples_of(lengths: list[int], dtype: str = "uint16") -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"tokens": rng.integers(0, 60_000, length).astype(dtype), "doc_starts": rng.bytes(length % 9)}
        for length in lengths
    ]


def write(folder: Path, samples: list[dict[str, Any]], shard_bytes: int, columns: dict[str, str] = COLUMNS) -> Any:
    writer = MdsWriter(folder, columns, shard_bytes)
    for sample in samples:
        writer.write(sample)
    return writer.finish()


def read(path: Path) -> list[dict[str, bytes]]:
    with open(path, "rb") as file:
        shard = MdsShard(file)
    return [
        {name: value.tobytes() for name, value in shard.sample(index).items()} for index in range(shard.num_samples)
    ]


def as_bytes(samples: list[dict[str, Any]]) -> list[dict[str, bytes]]:
    return [{name: bytes(value) for name, value in sample.items()} for sample in samples]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("shard_bytes", [600, 4096, 1 << 20])
def test_files_and_index_are_those_of_the_library(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    from streaming import MDSWriter

    columns = {"tokens": array_of(dtype), "doc_starts": BYTES}
    samples = samples_of([1, 255, 256, 257, 3, 3, 3, 70_000, 5, 1], dtype)
    entries = write(tmp_path / "ours", samples, shard_bytes, columns)
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=["sha256"], size_limit=shard_bytes) as writer:
        for sample in samples:
            writer.write(sample)
    theirs = json.loads((tmp_path / "theirs" / "index.json").read_text())["shards"]
    assert [index_entry(entry, columns, shard_bytes) for entry in entries] == theirs
    for entry in entries:
        assert (tmp_path / "ours" / entry.name).read_bytes() == (tmp_path / "theirs" / entry.name).read_bytes()
    assert [sample for entry in entries for sample in read(tmp_path / "theirs" / entry.name)] == as_bytes(samples)


def test_the_library_opens_what_the_tokenize_stage_writes(shards_16: Path) -> None:
    from streaming import StreamingDataset

    from data.shards import TokenSplit

    dataset = StreamingDataset(local=str(shards_16), split="train", batch_size=1, shuffle=False, validate_hash="sha256")
    ours = list(TokenSplit(shards_16, "train").samples())
    assert len(dataset) == len(ours) > 100
    for index, sample in enumerate(ours):
        theirs = dataset[index]
        assert theirs["tokens"].tolist() == sample["tokens"].tolist()
        assert theirs["doc_starts"] == sample["doc_starts"].tobytes()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=30), shard_bytes=st.integers(100, 3000))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_bytes: int
) -> None:
    folder, samples = tmp_path_factory.mktemp("shards"), samples_of(lengths)
    entries = write(folder, samples, shard_bytes)
    assert sum(entry.num_samples for entry in entries) == len(samples)
    for entry in entries:
        assert (folder / entry.name).stat().st_size == entry.num_bytes
        assert entry.num_bytes <= shard_bytes or entry.num_samples == 1
    assert [sample for entry in entries for sample in read(folder / entry.name)] == as_bytes(samples)


@pytest.mark.parametrize("data", [b"", b"\1\0\0\0", b"no shard at all, whatever its length is", b"\0" * 64])
def test_another_file_is_refused_by_its_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.mds").write_bytes(data)
    with open(tmp_path / "x.mds", "rb") as file, pytest.raises(DamagedError, match=r"x\.mds: not a shard in the MDS"):
        MdsShard(file)
