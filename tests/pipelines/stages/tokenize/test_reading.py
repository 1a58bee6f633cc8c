"""Shards read from an object store: when they are needed, within the cache's limit, through outages, checked."""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from base.errors import DamagedError
from data import streaming
from data.config import FilesSource, TokenizeFields
from data.shards import TokenSplit, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.errors import InfrastructureError
from pipelines.stages.tokenize import reading
from pipelines.stages.tokenize.reading import token_split
from pipelines.storage import Storage
from pipelines.storage.artifact import ArtifactDir
from tests.data.here import tokenize_here
from tests.pipelines.faulty_proxy import FaultyProxy
from tests.pipelines.stages.trained_run import tiny_tokenizer

SHARD_BYTES = 4096
CACHE_BYTES = 1 << 15


def write(folder: Path, num_documents: int) -> Path:
    """Somewhat more shards of a tokenize stage than there are documents."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(map(str, rng.integers(0, 10**6, 300)))}) for _ in range(num_documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    source = FilesSource(kind="files", paths=(str(folder / "corpus.jsonl"),))
    fields = TokenizeFields(source=source, seq_len=64, shard_bytes=SHARD_BYTES, validation_fraction=0)
    tokenize_here(tiny_tokenizer(), fields, folder / "tokens")
    return folder / "tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 25 shards, four times what the cache has room for."""
    return write(tmp_path_factory.mktemp("few") / "text", 20)


@pytest.fixture
def artifact(folder: Path, s3_storage: Storage, proxy: FaultyProxy) -> ArtifactDir:
    """The same in an object store."""
    s3_storage.put_tree(folder, "artifacts/tokens-0")
    return ArtifactDir(s3_storage, "artifacts/tokens-0")


def stream_of(tokens: TokenSplit) -> TokenStream:
    return TokenStream(
        [tokens], micro_batch_size=4, global_batch_size=4, order=StreamOrder(block_samples=32), worker=Worker()
    )


def shards_fetched(proxy: FaultyProxy) -> set[str]:
    return {path for method, path in proxy.requests if method == "GET" and path.partition("?")[0].endswith(".mds")}


def cached_bytes(tmp_path: Path) -> int:
    """Bytes of the shards that are there or arriving, while none is added."""
    folder = tmp_path / "cache" / "shards"
    with open(folder / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        room: dict[str, int] = {}
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # it has arrived meanwhile, or there was no room for it
                if path.suffix in (".mds", ".part"):
                    room[path.stem] = max(room.get(path.stem, 0), path.stat().st_size)
        return sum(room.values())


@pytest.mark.ci
def test_shards_come_when_they_are_needed_and_the_cache_keeps_its_limit(
    s3_storage: Storage, proxy: FaultyProxy, tmp_path: Path
) -> None:
    folder = write(tmp_path / "text", 100)
    s3_storage.put_tree(folder, "artifacts/tokens-0")
    tokens = token_split(ArtifactDir(s3_storage, "artifacts/tokens-0"), "train", CACHE_BYTES)
    num_batches = tokens.index.counts.num_samples // 4
    most = 0
    with stream_of(tokens) as stream:
        batches = iter(stream)
        found = [next(batches).tokens_bt]
        assert len(shards_fetched(proxy)) < 0.05 * len(tokens.index)
        for batch in islice(batches, num_batches - 1):
            found.append(batch.tokens_bt)
            most = max(most, cached_bytes(tmp_path))
    assert 0 < most <= CACHE_BYTES < tokens.index.num_bytes / 8
    with stream_of(TokenSplit(folder, "train")) as stream:
        for here, there in zip(stream, found, strict=False):
            assert here.tokens_bt.equal(there)


def test_an_outage_longer_than_a_call_is_repeated_costs_time_only(
    artifact: ArtifactDir, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("BMOJO_STORAGE_RETRY_S", "0.2")
    monkeypatch.setattr(reading, "_PAUSE_S", 0.1)
    tokens = token_split(artifact, "train", CACHE_BYTES)
    away_until = 0.0
    proxy.fault = lambda method, path: "503 SlowDown" if time.monotonic() < away_until else None
    with stream_of(tokens) as stream, stream_of(TokenSplit(folder, "train")) as expected:
        for number, (here, there) in enumerate(zip(expected, stream, strict=False)):
            assert here.tokens_bt.equal(there.tokens_bt)
            if number == 5:
                away_until = time.monotonic() + 1.0
            if number > 40:
                break
    assert time.monotonic() > away_until


def test_a_store_that_does_not_come_back_is_an_error_of_its_own(
    artifact: ArtifactDir, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMOJO_STORAGE_RETRY_S", "0.2")
    monkeypatch.setattr(reading, "_PAUSE_S", 0.1)
    monkeypatch.setattr(reading, "_OUTAGE_S", 0.5)
    tokens = token_split(artifact, "train", CACHE_BYTES)
    assert len(tokens.index) > 20
    proxy.fault = lambda method, path: "503 SlowDown"
    with stream_of(tokens) as stream, pytest.raises(InfrastructureError):
        next(iter(stream))


def test_a_shard_damaged_in_the_store_is_refused_by_its_name(artifact: ArtifactDir, s3_storage: Storage) -> None:
    tokens = token_split(artifact, "train", CACHE_BYTES)
    first, second = (f"artifacts/tokens-0/train/{tokens.index.entry(number).name}" for number in (0, 1))
    s3_storage.write_bytes_atomic(first, s3_storage.read_bytes(second))  # swapped with its neighbour
    with pytest.raises(DamagedError, match=r"shard\.00000\.mds: damaged"):
        next(read_token_batches(tokens, 1))
    flipped = bytearray(s3_storage.read_bytes(second))
    flipped[99] ^= 4
    s3_storage.write_bytes_atomic(second, bytes(flipped))
    with pytest.raises(DamagedError, match=r"shard\.00001\.mds: damaged"):
        tokens.open_shard(1)


def test_reading_a_few_samples_fetches_their_shards_only(artifact: ArtifactDir, proxy: FaultyProxy) -> None:
    tokens = token_split(artifact, "train", CACHE_BYTES)
    start = tokens.index.counts.num_samples // 2
    assert len(list(tokens.samples(start, start + 3))) == 3
    assert len(shards_fetched(proxy)) <= 2


def test_a_stream_that_waits_for_the_store_is_closed_soon(
    artifact: ArtifactDir, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is about to be taken away has seconds, and its store may be away too."""
    monkeypatch.setenv("BMOJO_STORAGE_RETRY_S", "0.2")
    monkeypatch.setattr(reading, "_OUTAGE_S", 8.0)
    monkeypatch.setattr(streaming, "_END_S", 0.5)
    tokens = token_split(artifact, "train", CACHE_BYTES)
    assert len(tokens.index) > 20
    proxy.fault = lambda method, path: "503 SlowDown"
    with stream_of(tokens) as stream:
        iter(stream)
        started = time.monotonic()
    assert time.monotonic() - started < 5.0
