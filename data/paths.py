"""Paths that users write."""

from __future__ import annotations

from pathlib import Path

from data.errors import DataError


def expanded(path: str | Path, name: str = "") -> Path:
    """The path with `~` replaced by a home directory.

    Args: name: the setting that holds the path, for the message.
    Raises: DataError: there is no such user, or the user has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(
            f"{name and name + ': '}{path}: no such user, or a user without home. Write the folder's path out."
        ) from None
