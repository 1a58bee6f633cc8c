"""The folder in which Ray Train keeps its own bookkeeping while one training runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from pipelines.engine.process import ProcessIdentity

_PREFIX = "bmojo-ray-train-"
_OWNER = "owner.json"


def new_ray_train_folder() -> str:
    """A folder that says whose it is: if this process is killed, the next training here or `bmojo gc` removes it."""
    for left in filter(is_left, ray_train_folders()):
        shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    (Path(folder) / _OWNER).write_text(ProcessIdentity.of_this_process().model_dump_json())
    return folder


def ray_train_folders() -> list[Path]:
    """Those there are on this machine."""
    return sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))


def is_left(folder: Path) -> bool:
    """Whether its process is dead; only where that is certain."""
    try:
        owner = ProcessIdentity.model_validate_json((folder / _OWNER).read_text())
    except (OSError, ValidationError):
        return False
    return owner.is_known_dead()
