"""Which MLflow store shows the runs: configured, from the environment, or SQLite under the storage."""

from __future__ import annotations

import os
import re
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipelines.errors import ConfigError
from pipelines.redact import MASK, redact
from pipelines.storage import LocalStorage, Storage
from pipelines.tracking.mlflow.sqlite import SQLITE_FILE, sqlite_uri
from pipelines.tracking.mlflow.trouble import explain
from pipelines.tracking.sink import SinkConfig, Target, local_folder
from pipelines.tracking.trouble import Trouble

if TYPE_CHECKING:
    from pipelines.tracking.mlflow.sink import MlflowSink

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


@dataclass(frozen=True)
class MlflowTarget(Target):
    """An MLflow tracking URI and experiment."""

    name: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"

    uri: str
    experiment: str
    artifact_root: Path | None = None  # of a store of our own; None if the server decides
    notice: str | None = None

    @property
    def identity(self) -> str:
        """URI and experiment."""
        return f"{self.uri}\n{self.experiment}"

    @property
    def shown_uri(self) -> str:
        """The URI without credentials."""
        return str(redact(self.uri))

    @property
    def where(self) -> str:
        """For messages."""
        return f"MLflow at {self.shown_uri}"

    def open(self, run_id: str) -> MlflowSink:
        """As Target.open. Raises UserError: no SQLite file that can be opened, or a deleted experiment."""
        from pipelines.tracking.mlflow.sink import MlflowSink

        return MlflowSink(self.uri, self.experiment, self.artifact_root, run_id)

    def has_store(self) -> bool:
        """Whether there is a store of our own."""
        return self.artifact_root is not None and (self.artifact_root.parent / SQLITE_FILE).exists()

    def answers(self) -> bool:
        """Whether there is a server at all. True for what is not a server."""
        parts = urlsplit(self.uri)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            return True
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname, port), 3).close()
        except OSError:
            return False
        return True

    def link(self, run: str | None, storage: Storage) -> str | None:
        """As Target.link."""
        if self.artifact_root is not None:
            return f"bmojo ui --storage {shlex.quote(storage.url)}"
        if urlsplit(self.uri).scheme not in ("http", "https"):
            return None
        return f"{self.shown_uri.rstrip('/')}/#/runs/{run}" if run else self.shown_uri

    def _explain(self, error: Exception) -> Trouble | None:
        return explain(error, self.where, self.shown_uri, self.experiment)


class MlflowConfig(SinkConfig):
    """An MLflow experiment. Training never waits for the tracking server: see docs/design/0004."""

    target_type: ClassVar[type[Target]] = MlflowTarget

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        None,
        description="MLflow tracking URI. Left out: MLFLOW_TRACKING_URI where set, else SQLite under `storage`.",
    )
    experiment: str = Field("bmojo", min_length=1, description="MLflow experiment that the runs belong to.")

    def target(self, storage: Storage) -> MlflowTarget:
        """The configured store; without one $MLFLOW_TRACKING_URI, else a SQLite store under the storage.

        A SQLite store cannot live on an object store; it is then kept under ./.bmojo of the machine that drives the
        run.

        Raises: ConfigError: the URI is of a kind that MLflow does not take.
        """
        chosen = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if chosen:
            # A stored URI has its credentials masked; MLflow takes them from MLFLOW_TRACKING_USERNAME and _PASSWORD
            # instead.
            check_uri(chosen, "tracking.uri" if self.uri else "MLFLOW_TRACKING_URI")
            return MlflowTarget(chosen.replace(f"://{MASK}@", "://"), self.experiment)
        root = local_folder(storage, "mlflow")
        notice = None
        if not isinstance(storage, LocalStorage):
            notice = (
                f"MLflow's SQLite store cannot live on {storage.url}; it is kept in {root} of this machine. Set "
                "tracking.uri or MLFLOW_TRACKING_URI to a server to see runs from elsewhere."
            )
        return MlflowTarget(sqlite_uri(root / SQLITE_FILE), self.experiment, root / "artifacts", notice)


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
