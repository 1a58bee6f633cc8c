"""Contexts kept on disk by id: each is one file, complete or absent, that only the model which wrote it continues."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from base import files, sealed
from base.errors import DamagedError, UserError
from bmojo.state import DecodingState
from pipelines.serving.context import Context

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".safetensors"
_FACTS = "bmojo"  # key of the facts in the file's metadata
_LOGITS = "next_logits"


class StateError(UserError):
    """What was asked of the states cannot be done."""


class NoSuchStateError(StateError):
    """There is none of this id."""


class StateExistsError(StateError):
    """There is one of this id already, and states are never changed."""


class StateFacts(BaseModel):
    """What is known of a state without its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    created_at: float  # seconds since the epoch
    num_tokens: int
    num_bytes: int  # of its tensors
    model: str  # name, for people
    model_digest: str
    tensors_sha256: str


def check_id(state_id: str) -> str:
    """The id. Raises: StateError: it may not be one."""
    if not _ID.fullmatch(state_id):
        raise StateError(
            f"{state_id!r} cannot be the id of a state: 1 to 64 letters, digits, dots, dashes and underscores, of "
            "which the first is a letter or a digit."
        )
    return state_id


class StateStore:
    """The states in a folder. Several processes may use one; a file appears with all its content, or not at all."""

    def __init__(self, folder: Path, model: str, model_digest: str, like: DecodingState) -> None:
        """Args: model: its name. like: its state before the first token, of one row."""
        self.folder = folder
        self._model, self._digest, self._like = model, model_digest, like

    def save(self, state_id: str, context: Context) -> StateFacts:
        """Return once the state is on the disk, safe from a power cut. Raises: StateError; OSError."""
        file = self._file(state_id)
        tensors = {path: x.detach().cpu().contiguous() for path, x in context.state.tensors().items()}
        tensors[_LOGITS] = context.logits_v.detach().cpu().contiguous()
        facts = StateFacts(
            id=state_id,
            created_at=time.time(),
            num_tokens=context.num_tokens,
            num_bytes=sum(x.numel() * x.element_size() for x in tensors.values()),
            model=self._model,
            model_digest=self._digest,
            tensors_sha256=_sha256(tensors),
        )
        data = save(tensors, metadata={_FACTS: sealed.dumps(sealed.seal(facts.model_dump()))})
        try:
            files.create(file, data)
        except FileExistsError:
            raise _exists(state_id) from None
        return facts

    def check_free(self, state_id: str) -> None:
        """Raises: StateError: a state of this id exists, or cannot."""
        if self._file(state_id).exists():
            raise _exists(state_id)

    def load(self, state_id: str) -> Context:
        """Raises: StateError: there is none, or another model's. DamagedError."""
        facts, file = self.facts(state_id), self._file(state_id)
        if facts.model_digest != self._digest:
            raise StateError(
                f"state {state_id!r} was written by model {facts.model} (digest {facts.model_digest[:12]}); this is "
                f"{self._model} (digest {self._digest[:12]}), to which it means nothing. Give the text again."
            )
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError) as error:
            raise _damaged(state_id, error) from error
        if _sha256(tensors) != facts.tensors_sha256:
            raise _damaged(state_id, "its content does not match its digest")
        device = self._like.position_b.device
        on_device = {name: x.to(device) for name, x in tensors.items()}
        logits_v = on_device.pop(_LOGITS)
        try:
            return Context(DecodingState.from_tensors(on_device, self._like, f"state {state_id!r}"), logits_v)
        except ValueError as error:
            raise _damaged(state_id, error) from error

    def facts(self, state_id: str) -> StateFacts:
        """Raises: StateError: there is none. DamagedError."""
        file = self._file(state_id)
        try:
            with safe_open(file, "pt") as opened:
                metadata: Mapping[str, str] = opened.metadata() or {}
            text = metadata[_FACTS]
            facts = StateFacts.model_validate(sealed.unseal(text.encode(), f"state {state_id!r}"))
        except FileNotFoundError:
            raise NoSuchStateError(f"there is no state {state_id!r}. GET /v1/states lists those there are.") from None
        except (SafetensorError, OSError, KeyError, ValueError, DamagedError) as error:
            raise _damaged(state_id, error) from error
        return facts

    def all(self) -> list[StateFacts]:
        """Of every readable state, the oldest first; also those of other models."""
        found = []
        for file in sorted(self.folder.glob(f"*{_SUFFIX}")) if self.folder.is_dir() else []:
            state_id = file.name.removesuffix(_SUFFIX)
            if _ID.fullmatch(state_id):
                try:
                    found.append(self.facts(state_id))
                except (StateError, DamagedError):
                    continue  # deleted meanwhile, or damaged: `facts` of it says so
        return sorted(found, key=lambda facts: facts.created_at)

    def delete(self, state_id: str) -> None:
        """Raises: StateError: there is none."""
        try:
            self._file(state_id).unlink()
        except FileNotFoundError:
            raise NoSuchStateError(f"there is no state {state_id!r}.") from None

    def remove_unfinished(self) -> None:
        """Remove what a killed process left half written. Only when no other process writes here."""
        for file in self.folder.glob(".*.tmp") if self.folder.is_dir() else []:
            if files.is_temporary(file.name) and time.time() - file.stat().st_mtime > 3600:
                file.unlink(missing_ok=True)

    def _file(self, state_id: str) -> Path:
        return self.folder / f"{check_id(state_id)}{_SUFFIX}"


def _exists(state_id: str) -> StateExistsError:
    return StateExistsError(
        f"there is a state {state_id!r} already, and states do not change. Delete it, or choose another id."
    )


def _damaged(state_id: str, found: object) -> DamagedError:
    return DamagedError(f"state {state_id!r} is damaged: {found}. Delete it, and give the text again.")


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
