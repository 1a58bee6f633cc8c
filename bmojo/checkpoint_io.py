"""A model on disk: config.json, model.safetensors and digests.json, with the digests of the others, in one directory.

Weights of more than SHARD_BYTES are in several files (model-00001-of-00003.safetensors), which
model.safetensors.index.json lists as Hugging Face's libraries do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from base.digest import file_sha256
from base.errors import DamagedError
from bmojo.config import ModelConfig
from bmojo.model import BMojoLM
from bmojo.tensor_file import save_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DIGESTS_NAME = "digests.json"
SHARD_BYTES = 5 * 10**9


def plan_shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The tensors of each file, by its name, both in order.

    Args: sizes: bytes of each tensor. A file has at most SHARD_BYTES of them, unless a single one has more.
    """
    shards: list[list[str]] = [[]]
    left = SHARD_BYTES
    for name in sorted(sizes):
        if shards[-1] and sizes[name] > left:
            shards.append([])
            left = SHARD_BYTES
        shards[-1].append(name)
        left -= sizes[name]
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    total = len(shards)
    return {f"model-{number:05d}-of-{total:05d}.safetensors": names for number, names in enumerate(shards, 1)}


def write_settings(
    config: ModelConfig, sizes: Mapping[str, int], shards: Mapping[str, list[str]], directory: Path
) -> None:
    """Write config.json and, if there are several files of weights, their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(config.model_dump(), indent=2) + "\n")
    (directory / INDEX_NAME).unlink(missing_ok=True)
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def weight_files(directory: Path) -> list[str]:
    """Names of the files with the weights. Raises: DamagedError: the index cannot be read."""
    index = directory / INDEX_NAME
    if not index.is_file():
        return [WEIGHTS_NAME]
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{index} is damaged: it should list the files of the weights.") from error


def write_digests(directory: str | Path, known: Mapping[str, str] | None = None) -> None:
    """Write digests.json for the config and weights in a directory as they are now.

    Args: known: SHA-256 of files that need not be read, or are not here.
    """
    directory = Path(directory)
    known = known or {}
    digests = {name: known.get(name) or file_sha256(directory / name) for name in _files(directory)}
    (directory / DIGESTS_NAME).write_text(json.dumps(digests, indent=2) + "\n")


def _files(directory: Path) -> list[str]:
    """Names of all files that make a model."""
    index = [INDEX_NAME] if (directory / INDEX_NAME).is_file() else []
    return [CONFIG_NAME, *index, *weight_files(directory)]


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
        known = {name: digests[name] for name in _files(directory)}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is damaged: it should hold the digests of config and weights.") from error
    for name, digest in known.items():
        if not (directory / name).is_file() or file_sha256(directory / name) != digest:
            raise DamagedError(
                f"{directory / name} is damaged, or {DIGESTS_NAME} beside it is: its SHA-256 is not the one there. "
                "Restore the file, or make the model again."
            )


def check_files(directory: Path) -> None:
    """Raises: FileNotFoundError: not a model directory. DamagedError: a file is not as it was written."""
    for name in (CONFIG_NAME, *weight_files(directory)):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; expected a directory written by save_pretrained.")
    check_digests(directory)


def weights_by_name(directory: Path) -> Callable[[str], torch.Tensor]:
    """What reads one tensor at a time of a directory whose files were checked. It raises KeyError: there is none."""
    files = [safe_open(directory / name, framework="pt") for name in weight_files(directory)]
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = places[name].get_tensor(name)
        return tensor

    return read


def save_pretrained(model: BMojoLM, directory: str | Path) -> None:
    """Write the model's config and weights; a tied output projection is stored once."""
    directory = Path(directory)
    tensors = {name: x.detach() for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop("head.weight")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = plan_shards(sizes)
    write_settings(model.config, sizes, shards, directory)
    written = {
        file: save_tensors({name: tensors[name] for name in names}, directory / file).sha256
        for file, names in shards.items()
    }
    write_digests(directory, written)


def load_pretrained(
    directory: str | Path, device: torch.device | str = "cpu", num_eidetic: int | None = None
) -> BMojoLM:
    """Read what save_pretrained wrote. num_eidetic: another number of eidetic slots than at training.

    Raises: FileNotFoundError: not a model directory. DamagedError: a file is not as it was written.
        ValueError: the weights are not those of the config.
    """
    directory = Path(directory)
    check_files(directory)
    config = ModelConfig.model_validate_json((directory / CONFIG_NAME).read_text())
    if num_eidetic is not None:
        config = config.replace(num_eidetic=num_eidetic)
    tensors: dict[str, torch.Tensor] = {}
    for name in weight_files(directory):
        tensors |= load_file(directory / name, device=str(device))
    if config.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    with torch.device(device):
        model = BMojoLM(config)
    model = model.to(tensors["embedding.weight"].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{directory}: the weights do not fit {CONFIG_NAME} beside it: {error}") from error
    return model
