"""The folder in which this machine remembers what it has worked out or fetched."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """$BMOJO_CACHE_DIR, else bmojo under the user's cache directory. It may not exist yet.

    A user without home, as in many containers, gets a temporary one.
    """
    configured = os.environ.get("BMOJO_CACHE_DIR")
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bmojo"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"bmojo-{os.getuid()}"
