"""Durable bytes: one protocol, on a local directory or on an object store."""

from __future__ import annotations

import os

from pipelines.storage.local import LocalStorage
from pipelines.storage.storage import Storage

__all__ = ["LocalStorage", "Storage", "open_storage"]


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at a local path or an fsspec URL such as s3://bucket/prefix. Nothing is contacted or created yet.

    Raises: UserError: the scheme is unknown, or the package for it is not installed.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme in ("file", "local"):
        return LocalStorage(rest if separator else text)
    from pipelines.storage.objects import ObjectStorage

    return ObjectStorage(text)
