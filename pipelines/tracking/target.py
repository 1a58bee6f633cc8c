"""Where runs are shown: the MLflow store that a run is replayed to."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.errors import ConfigError
from pipelines.redact import MASK, redact
from pipelines.storage import LocalStorage, Storage

SQLITE_FILE = "mlflow.db"
_LOCAL_FALLBACK = ".bmojo"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


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

    Raises: ConfigError: the URI is of a kind that MLflow does not take.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        # A stored URI has its credentials masked; MLflow takes them from MLFLOW_TRACKING_USERNAME and _PASSWORD
        # instead.
        check_uri(chosen, "tracking.uri" if uri else "MLFLOW_TRACKING_URI")
        return TrackingTarget(chosen.replace(f"://{MASK}@", "://"), experiment)
    if isinstance(storage, LocalStorage):
        root, notice = storage.path("mlflow"), None
    else:
        root = Path(_LOCAL_FALLBACK).resolve() / "mlflow"
        notice = (
            f"MLflow's SQLite store cannot live on {storage.url}; it is kept in {root} of this machine. Set "
            "tracking.uri or MLFLOW_TRACKING_URI to a server to see runs from elsewhere."
        )
    return TrackingTarget(sqlite_uri(root / SQLITE_FILE), experiment, root / "artifacts", notice)


def sqlite_uri(path: Path) -> str:
    """The URL of a SQLite file; %, ? and # in its path are quoted as SQLAlchemy reads them."""
    from sqlalchemy import URL

    uri = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    if uri.endswith(str(path)):
        return uri
    # For plain sqlite: URLs, MLflow makes the folder that the quoted path would name.
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1)


def check_uri(uri: str, setting: str) -> None:
    """Raises ConfigError: no MLflow store can have this URI. `setting` is what the user wrote it in."""
    found = _SCHEME.match(uri)
    scheme = found[1].lower() if found else uri if uri in _SCHEMES else ""
    expected = (
        "Expected the URL of a server (http://HOST:PORT) or of a database (sqlite:////PATH/mlflow.db, "
        "postgresql://...). Correct it, or leave it out: runs are then kept in a SQLite store beside them."
    )
    if scheme == "file" or (not scheme and not any(blank in uri for blank in " \t\n")):
        raise ConfigError(
            f"{setting}={redact(uri)!s} is a folder, and MLflow no longer takes folders as stores. {expected}"
        )
    if scheme.partition("+")[0] not in _SCHEMES:
        raise ConfigError(f"{setting}={redact(uri)!s}: MLflow has no store of this kind. {expected}")
    if scheme in ("http", "https"):
        try:
            parts = urlsplit(uri)
            is_whole = bool(parts.hostname) and not re.search(r"\s", uri) and (parts.port is None or parts.port > 0)
        except ValueError:
            is_whole = False
        if not is_whole:
            raise ConfigError(f"{setting}={redact(uri)!s} names no server. {expected}")
