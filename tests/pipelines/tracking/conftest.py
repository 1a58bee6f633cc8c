from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage import open_storage
from pipelines.tracking.environment import quiet_environment
from pipelines.tracking.mlflow.target import MlflowConfig, MlflowTarget
from tests.pipelines.tracking.mlflow_server import Server


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_environment()


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> MlflowTarget:
    """A SQLite store; making one takes MLflow seconds, so the tests share it and use run ids of their own."""
    return MlflowConfig(experiment="experiment").target(open_storage(tmp_path_factory.mktemp("storage")))


@pytest.fixture
def server(tmp_path: Path, target: MlflowTarget) -> Iterator[Server]:
    target.open("make-the-store")  # copied below: the migrations need not run again
    assert target.artifact_root is not None
    root = tmp_path / "server"
    root.mkdir()
    (root / "mlflow.db").write_bytes((target.artifact_root.parent / "mlflow.db").read_bytes())
    server = Server(root)
    yield server
    server.kill()
