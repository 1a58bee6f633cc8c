"""What planning has measured on this machine, kept in the cache folder: small files of JSON."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from base.cache import cache_dir
from pipelines.engine.provenance import library_versions

Kept = TypeVar("Kept", bound=BaseModel)


def recall(name: str, kind: type[Kept]) -> Kept | None:
    """What was kept under a name, on this machine and with these versions; None: nothing, or it is damaged."""
    try:
        return kind.model_validate_json(_file(name).read_text())
    except (OSError, ValidationError, UnicodeError):
        return None


def keep(name: str, value: BaseModel) -> None:
    """Keep a value for the next time; a folder that cannot be written is no error."""
    file = _file(name)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(value.model_dump_json())
        part.replace(file)


def _file(name: str) -> Path:
    versions = library_versions()
    libraries = "-".join(f"{name}-{versions.get(name, 'none')}" for name in ("torch", "deepspeed", "ray"))
    machine = re.sub(r"[^\w.-]+", "-", f"{platform.node()}-{platform.machine()}-{libraries}")
    return cache_dir() / "plans" / machine / f"{name}.json"


def digest(text: str) -> str:
    """A short name for what a long text says."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
