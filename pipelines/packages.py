"""The packages of this program, as they lie in its checkout and are shipped to a cluster."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("base", "bmojo", "data", "kernels", "pipelines")
PRESETS_DIR = REPOSITORY / "configs" / "models"
