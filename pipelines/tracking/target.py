"""Where runs are shown: the MLflow store that a run is replayed to."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.engine.storage import Storage
from pipelines.tracking.redact import MASK, redact

SQLITE_FILE = "mlflow.db"
_LOCAL_FALLBACK = ".bmojo"


@dataclass(frozen=True)
class TrackingTarget:
    """An MLflow tracking URI and experiment."""

    uri: str
    experiment: str
    artifact_root: Path | None = None  # of a store of our own; None where the server decides
    notice: str | None = None  # what the user should know about the choice

    @property
    def key(self) -> str:
        """Short name of this target for files that belong to it."""
        return hashlib.sha256(f"{self.uri}\n{self.experiment}".encode()).hexdigest()[:12]

    @property
    def shown_uri(self) -> str:
        """The URI without credentials."""
        return str(redact(self.uri))


def resolve_target(uri: str | None, experiment: str, storage: Storage) -> TrackingTarget:
    """The target for a configured URI; without one $MLFLOW_TRACKING_URI, else a SQLite store under the storage.

    A SQLite store cannot live on an object store; it is then kept under ./.bmojo of the machine that drives the run.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        # A stored URI has its credentials masked; MLflow takes them from MLFLOW_TRACKING_USERNAME and _PASSWORD
        # instead.
        return TrackingTarget(chosen.replace(f"://{MASK}@", "://"), experiment)
    if storage.is_local:
        root, notice = storage.local_path("mlflow"), None
    else:
        root = Path(_LOCAL_FALLBACK).resolve() / "mlflow"
        notice = (
            f"MLflow's SQLite store cannot live on {storage.url}; it is kept in {root} of this machine. Set "
            "tracking.uri or MLFLOW_TRACKING_URI to a server to see runs from elsewhere."
        )
    return TrackingTarget(f"sqlite:///{root / SQLITE_FILE}", experiment, root / "artifacts", notice)
