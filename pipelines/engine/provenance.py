"""Which code and which libraries made a result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("bmojo-pipeline", "torch", "ray", "deepspeed", "mosaicml-streaming", "mlflow", "pydantic", "tokenizers")


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this source tree, with `-dirty` where tracked files differ from it.

    $BMOJO_GIT_COMMIT says it where the tree was shipped without its repository. None where nobody knows.
    """
    told = os.environ.get("BMOJO_GIT_COMMIT")
    if told:
        return told
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
