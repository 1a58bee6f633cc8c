"""MLflow's SQLite stores: a new one made whole, one opened with a clear error."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import threading
from pathlib import Path

from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.faults import explain_disk
from pipelines.redact import redact
from pipelines.tracking.mlflow.sqlite import SQLITE_FILE, sqlite_uri
from pipelines.tracking.mlflow.trouble import not_opened

_CREATING = threading.Lock()  # of this process: alembic, which makes the tables, keeps what it does in globals


def prepare_store(artifact_root: Path) -> None:
    """Make the folder of artifacts and the store beside it, if they are not there.

    Raises: UserError: this cannot be done there. InfrastructureError: the disk is full.
    """
    store = artifact_root.parent / SQLITE_FILE
    try:
        artifact_root.mkdir(parents=True, exist_ok=True)
        with _CREATING:
            if not store.exists():
                _create(store)
    except OSError as error:
        explained = explain_disk(error)
        if isinstance(explained, InfrastructureError):  # a full disk, not a wrong place
            raise explained from error
        raise UserError(not_opened(sqlite_uri(store), error)) from error


def _create(path: Path) -> None:
    """Make a new store complete or not at all: MLflow cannot resume migrations that were interrupted."""
    with tempfile.TemporaryDirectory(prefix=".creating-", dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        engine = create_sqlalchemy_engine_with_retry(sqlite_uri(unfinished))
        _initialize_tables(engine)
        engine.dispose()
        with contextlib.suppress(FileExistsError):  # another driver was quicker
            os.link(unfinished, path)


def check_store(uri: str) -> None:
    """Open a SQLite store once by itself: MLflow would try for minutes, with a warning each time.

    Raises: UserError: it cannot be opened. sqlite3.OperationalError: it is locked for now.
    """
    if not uri.startswith("sqlite"):
        return
    try:
        path = make_url(uri).database
        if path:
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
    except (sqlite3.Error, ArgumentError) as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise
        raise UserError(not_opened(str(redact(uri)), error)) from error
