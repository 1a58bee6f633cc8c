"""The bounded cache of shards: never over its limit, nothing in use removed, survivors of killed processes removed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from base.errors import DamagedError, UserError
from data import shard_cache
from data.records import ShardEntry
from data.shard_cache import CachedShardFiles

SIZE = 1000


class Store:
    """Shards of SIZE bytes elsewhere."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        (folder / "train").mkdir(parents=True)
        self.entries = []
        for number in range(num_shards):
            data = bytes([number]) * SIZE
            (folder / "train" / f"{number}.mds").write_bytes(data)
            self.entries.append(ShardEntry(f"{number}.mds", 1, SIZE, hashlib.sha256(data).hexdigest()))

    def copy(self, name: str, target: Path) -> None:
        self.fetched.append(name)
        data = (self.folder / name).read_bytes()
        target.write_bytes(data)

    def files(self, cache: Path, limit_bytes: int) -> CachedShardFiles:
        return CachedShardFiles(
            "store://x", lambda name: (self.folder / name).read_bytes(), self.copy, cache, limit_bytes
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", 10)


def num_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir() if path.suffix in (".mds", ".part"))


def read(files: CachedShardFiles, entry: ShardEntry) -> bytes:
    with files.open("train", entry) as file:
        return file.read()


def test_shards_are_fetched_once_and_the_one_opened_longest_ago_makes_room(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = store.files(cache, 3 * SIZE)
    for number in (0, 1, 2, 0, 3, 0, 1):
        assert read(files, store.entries[number]) == bytes([number]) * SIZE
        assert num_bytes(cache) <= 3 * SIZE
        time.sleep(0.01)  # times of use that differ
    assert [int(name[6]) for name in store.fetched] == [0, 1, 2, 3, 1]


def test_an_open_shard_is_not_removed_and_a_full_cache_says_what_to_do(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_FULL_S", 0.2)
    files = store.files(tmp_path / "cache", 2 * SIZE)
    with files.open("train", store.entries[0]), files.open("train", store.entries[1]):
        with pytest.raises(UserError, match=r"1,000 bytes of a shard do not fit into the cache of 2,000 bytes"):
            files._fetch("train", store.entries[2], patience_s=0.2)
        assert num_bytes(tmp_path / "cache") == 2 * SIZE
    assert read(files, store.entries[2]) == b"\2" * SIZE


def test_fetching_ahead_keeps_to_the_limit_and_is_not_repeated(store: Store, tmp_path: Path) -> None:
    files = store.files(tmp_path / "cache", 4 * SIZE)
    files.fetch_ahead("train", store.entries)
    files.fetch_ahead("train", store.entries)
    files._fetches.shutdown(wait=True)
    assert sorted(store.fetched) == [f"train/{number}.mds" for number in range(4)]
    assert num_bytes(tmp_path / "cache") == 4 * SIZE


def test_many_readers_share_one_cache(store: Store, tmp_path: Path) -> None:
    cache, errors, most = tmp_path / "cache", [], 0

    def read_all(files: CachedShardFiles, offset: int) -> None:
        try:
            for step in range(30):
                number = (offset + step) % 10
                assert read(files, store.entries[number]) == bytes([number]) * SIZE
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read_all, args=(store.files(cache, 5 * SIZE), offset)) for offset in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if cache.exists():
            most = max(most, sum(_size(path) for path in cache.iterdir() if path.suffix == ".mds"))
    assert not errors
    assert 0 < most <= 5 * SIZE
    assert {path.suffix for path in cache.iterdir()} <= {".mds", ""}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_what_a_killed_process_left_is_removed(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    script = f"""
import pathlib, sys, time
from data.records import ShardEntry
from data.shard_cache import CachedShardFiles
def copy(name, target):
    target.write_bytes(b"half")
    print("copying", flush=True)
    time.sleep(60)
files = CachedShardFiles("store://x", None, copy, pathlib.Path({str(cache)!r}), {2 * SIZE})
files.open("train", ShardEntry(*{tuple(store.entries[0])!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"copying\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert num_bytes(cache) == SIZE, "the room it had reserved"
    files = store.files(cache, 2 * SIZE)
    for number in (1, 2, 0):
        assert read(files, store.entries[number]) == bytes([number]) * SIZE
    assert {path.suffix for path in cache.iterdir()} <= {".mds", ""}
    assert num_bytes(cache) <= 2 * SIZE


@pytest.mark.parametrize("damage", ["flipped", "swapped", "gone"])
def test_a_shard_that_arrives_damaged_is_refused_by_name(store: Store, tmp_path: Path, damage: str) -> None:
    file = store.folder / "train" / "0.mds"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes((b"\0" * (SIZE - 1) + b"\1") if damage == "flipped" else b"\1" * SIZE)
    files = store.files(tmp_path / "cache", 2 * SIZE)
    with pytest.raises(DamagedError, match=r"store://x/train/0\.mds: (damaged|missing)"):
        files.open("train", store.entries[0])
    assert num_bytes(tmp_path / "cache") == 0
