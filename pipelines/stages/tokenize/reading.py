"""Where other stages read the shards of a `tokenize` stage: in place, or fetched one by one into a bounded cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from base.cache import cache_dir
from data.records import Split
from data.shard_cache import CachedShardFiles
from data.shards import LocalShardFiles, TokenSplit
from pipelines.errors import InfrastructureError
from pipelines.storage import LocalStorage
from pipelines.storage.artifact import ArtifactDir

CACHE = "shards"  # its folder in the cache of a machine
CACHE_BYTES = 64 << 30
_OUTAGE_S = 900.0  # how long a storage may be away while shards are fetched from it
_PAUSE_S = 2.0

Result = TypeVar("Result")

log = logging.getLogger(__name__)


def token_split(artifact: ArtifactDir, split: Split, cache_bytes: int = CACHE_BYTES) -> TokenSplit:
    """A split of a `tokenize` stage's artifact. Nothing is fetched yet."""
    storage = artifact.storage
    if isinstance(storage, LocalStorage):
        return TokenSplit(LocalShardFiles(artifact.local), split)
    files = CachedShardFiles(
        artifact.url,
        read=lambda name: _patiently(lambda: storage.read_bytes(f"{artifact.relpath}/{name}")),
        copy=lambda name, path: _patiently(lambda: storage.get_file(f"{artifact.relpath}/{name}", path)),
        folder=cache_dir() / CACHE,
        limit_bytes=cache_bytes,
    )
    return TokenSplit(files, split)


def _patiently(call: Callable[[], Result]) -> Result:
    """The call's result; repeated while the storage is away, longer than it is for a stage that has nothing to do."""
    deadline = time.monotonic() + _OUTAGE_S
    while True:
        try:
            return call()
        except InfrastructureError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("Waiting for the storage: %s", error)
            time.sleep(_PAUSE_S)
