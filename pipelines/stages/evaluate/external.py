"""Models from elsewhere: exports of ours, and what transformers knows, from a folder or the Hugging Face hub.

No code of a model's own is run. An export of ours is loaded by this program; weights must be safetensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from base.config import StrictConfig
from base.errors import UserError
from data.errors import DataError, SourceUnavailableError
from data.paths import expanded
from data.sources.digests import identity_of
from data.sources.hub import is_away

OURS = "bmojo"  # model_type of our exports
_CONFIG = "config.json"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken")  # of a model: settings, weights, tokenizer
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ExternalModelConfig(StrictConfig):
    """A model that no stage of the pipeline trained."""

    kind: Literal["hf"]
    name: str = Field(min_length=1, description="Folder of an exported model, or a name on the Hugging Face hub.")
    revision: str | None = Field(
        None, description="Commit, branch or tag on the hub; null: the newest. Only a commit stays what it is."
    )

    @property
    def folder(self) -> Path | None:
        """The folder, if the name is one."""
        try:
            path = expanded(self.name)
        except DataError:
            return None
        return path if path.is_dir() else None

    def version(self) -> str:
        """The commit on the hub, or the digest of the folder's files: it changes with what would be loaded.

        Raises: UserError: there is no such model. SourceUnavailableError: the hub cannot be reached.
        """
        folder = self.folder
        if folder is not None:
            if not (folder / _CONFIG).is_file():
                raise UserError(f"model.name={self.name}: the folder holds no {_CONFIG}. Expected an exported model.")
            return identity_of(files_of(folder))
        if self.name.startswith((".", "/", "~")):
            raise UserError(f"model.name={self.name}: there is no such folder (from {Path.cwd()}).")
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().model_info(self.name, revision=self.revision).sha)
        except Exception as error:  # the library raises many types, for a wrong name as for a dead network
            raise _explained(self.name, error) from error


def fetch(config: ExternalModelConfig, version: str) -> Path:
    """The model's files on this machine, compared with their version.

    Raises: UserError: the files have changed, or are not there. SourceUnavailableError: the hub cannot be reached.
    """
    folder = config.folder
    if folder is not None:
        if identity_of(files_of(folder)) != version:
            raise UserError(
                f"model.name={config.name}: its files have changed since the run was planned, or differ on this "
                "machine. Leave them alone while a run reads them, and run again."
            )
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.name, revision=version, allow_patterns=list(_FILES)))
    except Exception as error:
        raise _explained(config.name, error) from error


def is_ours(folder: Path) -> bool:
    """Whether an export of ours is in the folder. Raises UserError: there is no model."""
    try:
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG}: cannot be read as a model's settings: {error}.") from error
    return isinstance(settings, dict) and settings.get("model_type") == OURS


def files_of(folder: Path) -> list[Path]:
    """What of a folder is read."""
    return sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})


def _explained(name: str, error: Exception) -> Exception:
    """The error of ours for one of the hub's library."""
    problem = f"model.name={name}: {type(error).__name__}: {str(error).rstrip('.')}."
    if is_away(error):
        return SourceUnavailableError(f"{problem} The hub cannot be reached now, or is busy: run again later.")
    return UserError(
        f"{problem} Expected a folder, or a model of the Hugging Face hub that you may read; a full commit as "
        "`revision` needs no question about it."
    )
