"""MLflow's SQLite stores: their file and its URL."""

from __future__ import annotations

from pathlib import Path

SQLITE_FILE = "mlflow.db"


def sqlite_uri(path: Path) -> str:
    """The URL of a SQLite file; %, ? and # in its path are quoted as SQLAlchemy reads them."""
    from sqlalchemy import URL

    uri = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    if uri.endswith(str(path)):
        return uri
    # For plain sqlite: URLs, MLflow makes the folder that the quoted path would name.
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1)
