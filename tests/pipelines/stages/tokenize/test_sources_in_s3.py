"""Text in S3: listed, planned, read and told apart by its entity tags."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs

from data.errors import DataError, SourceUnavailableError
from data.sources import content_identity, plan_slices, stamp
from pipelines.storage import Storage
from tests.data.corpora import TEXTS, files, jsonl, texts_of, write

pytestmark = pytest.mark.ci


def test_text_in_s3_is_that_of_the_same_files_on_a_disk(tmp_path: Path, s3_storage: Storage) -> None:
    names = [f"c.{suffix}" for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet")]
    for name in names:
        path = write(tmp_path / name, TEXTS * 20)
        s3fs.S3FileSystem().put_file(str(path), f"{s3_storage.url.removeprefix('s3://')}/text/{name}")
    remote, local = files(f"{s3_storage.url}/text/*"), files(tmp_path / "c.*")
    assert texts_of(remote, 2000) == texts_of(local, 2000)

    before = content_identity(remote), stamp(remote)
    assert (content_identity(remote), stamp(remote)) == before
    s3fs.S3FileSystem().pipe(f"{s3_storage.url}/text/c.jsonl", jsonl([*TEXTS[1:], TEXTS[0]] * 20))
    assert content_identity(remote) != before[0]


def test_a_store_that_is_away_and_a_key_that_is_missing_are_two_things(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no file s3://"):
        plan_slices(files(f"{s3_storage.url}/none.jsonl"), 1024)
    with pytest.raises(DataError, match=r"there is no file s3://no-such-bucket-at-all/c\.jsonl"):
        plan_slices(files("s3://no-such-bucket-at-all/c.jsonl"), 1024)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceUnavailableError, match="cannot be read now"):
        plan_slices(files(f"{s3_storage.url}/c.jsonl"), 1024)
