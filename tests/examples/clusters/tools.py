"""Checkers that need not be installed: where they are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, package: str) -> str:
    """The path of a program beside this Python or in the PATH. Skips the test if there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return found
