"""A model on disk: config.json, model.safetensors and digests.json, with the digests of the two, in one directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from base.digest import file_sha256
from base.errors import DamagedError
from bmojo.config import ModelConfig
from bmojo.model import BMojoLM
from bmojo.tensor_file import save_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DIGESTS_NAME = "digests.json"


def write_digests(directory: str | Path) -> None:
    """Write digests.json for the config and weights in a directory as they are now."""
    directory = Path(directory)
    digests = {name: file_sha256(directory / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    (directory / DIGESTS_NAME).write_text(json.dumps(digests, indent=2) + "\n")


def check_digests(directory: Path) -> None:
    """Raises: DamagedError: config or weights are not those that digests.json was written for."""
    file = directory / DIGESTS_NAME
    if not file.is_file():
        raise DamagedError(
            f"{file} is missing: an earlier version of this program wrote the model, or the file was lost. If the "
            f"model is sound, call bmojo.checkpoint_io.write_digests({str(directory)!r}) once."
        )
    try:
        digests = json.loads(file.read_bytes())
        known = {name: digests[name] for name in (CONFIG_NAME, WEIGHTS_NAME)}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is damaged: it should hold the digests of two files.") from error
    for name, digest in known.items():
        if file_sha256(directory / name) != digest:
            raise DamagedError(
                f"{directory / name} is damaged, or {DIGESTS_NAME} beside it is: its SHA-256 is not the one there. "
                "Restore the file, or make the model again."
            )


def save_pretrained(model: BMojoLM, directory: str | Path) -> None:
    """Write the model's config and weights; a tied output projection is stored once."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(model.config.model_dump(), indent=2) + "\n")
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop("head.weight")
    save_tensors(tensors, directory / WEIGHTS_NAME)
    write_digests(directory)


def load_pretrained(
    directory: str | Path, device: torch.device | str = "cpu", num_eidetic: int | None = None
) -> BMojoLM:
    """Read what save_pretrained wrote. num_eidetic: another number of eidetic slots than at training.

    Raises: FileNotFoundError: not a model directory. DamagedError: a file is not as it was written.
        ValueError: the weights are not those of the config.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; expected a directory written by save_pretrained.")
    check_digests(directory)
    config = ModelConfig.model_validate_json((directory / CONFIG_NAME).read_text())
    if num_eidetic is not None:
        config = config.replace(num_eidetic=num_eidetic)
    tensors = load_file(directory / WEIGHTS_NAME, device=str(device))
    if config.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    with torch.device(device):
        model = BMojoLM(config)
    model = model.to(tensors["embedding.weight"].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME} does not fit {CONFIG_NAME} beside it: {error}") from error
    return model
