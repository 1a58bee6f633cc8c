from __future__ import annotations

import pytest

from pipelines.tracking.replay import Replay


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow, slow to import, has tests of its own."""
    monkeypatch.setattr(Replay, "deliver", lambda self: False)
