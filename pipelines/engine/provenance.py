"""Which code and which libraries made a result, and who drove them on which machine."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
from collections import Counter
from functools import lru_cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("bmojo-pipeline", "torch", "ray", "deepspeed", "mlflow", "pydantic", "tokenizers")


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


def user_name() -> str:
    """Who runs this process; its number where it has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@lru_cache(maxsize=1)
def machine() -> dict[str, str]:
    """The hardware of this machine: `cpu` (model and cores) and `gpus`."""
    return {"cpu": f"{_cpu_model()}, {os.cpu_count()} cores", "gpus": _gpus() or "none"}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, models), platform.processor() or platform.machine())


def _gpus() -> str | None:
    """As `2 x NAME`, asked of the driver's own tool: starting CUDA here would take memory on every GPU."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    names = Counter(filter(None, map(str.strip, listed.stdout.splitlines())))
    return ", ".join(f"{count} x {name}" for name, count in names.items()) or None
