"""What tests of several parts of the pipelines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.storage import Storage, open_storage
from pipelines.storage import storage as storage_module
from tests.pipelines.faulty_proxy import FaultyProxy


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_storage(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path, request) -> Iterator[Storage]:
    """A fresh bucket, and a cache directory of the test's own."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-only-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"test-{abs(hash(request.node.nodeid)) % 10**10}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield open_storage(f"s3://{bucket}/prefix")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(s3_storage: Storage, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands between storages and the server, and breaks requests as it is told."""
    import s3fs

    server = FaultyProxy(s3_endpoint, hang_s=1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(storage_module, "_PAUSE_S", (0.02, 0.2))
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    server.close()
