"""MLflow's SQLite stores, made by several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.tracking.mlflow.store import prepare_store


def test_two_threads_that_want_a_new_store_make_one(tmp_path: Path) -> None:
    """The check of a tracker that takes too long is still under way when the replay begins."""
    with ThreadPoolExecutor(2) as threads:
        for made in [threads.submit(prepare_store, tmp_path / "artifacts") for _ in range(2)]:
            made.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "mlflow.db"]
