"""A model on disk: config.json and model.safetensors in one directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bmojo.config import ModelConfig
from bmojo.model import BMojoLM

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_pretrained(model: BMojoLM, directory: str | Path) -> None:
    """Write the model's config and weights; a tied output projection is stored once."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(model.config.model_dump(), indent=2) + "\n")
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop("head.weight")
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def load_pretrained(
    directory: str | Path, device: torch.device | str = "cpu", num_eidetic: int | None = None
) -> BMojoLM:
    """Read what save_pretrained wrote. num_eidetic: another number of eidetic slots than at training.

    Raises: FileNotFoundError: not a model directory. ValueError: the weights are not those of the config.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; expected a directory written by save_pretrained.")
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
