"""Models and tokenizers out of finished stages: fetched, compared with their digests, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from base.errors import DamagedError, UserError
from data.errors import DataError
from pipelines.stages.precision import used_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from bmojo import BMojoLM
    from data.tokenizer import Tokenizer
    from pipelines.storage.artifact import ArtifactDir


def load_model(artifact: ArtifactDir, relpath: str) -> BMojoLM:
    """The model in a folder of a train stage's artifact, on the CPU. Raises DamagedError."""
    from bmojo.checkpoint_io import load_pretrained

    folder = artifact.fetch(relpath)
    try:
        return load_pretrained(folder)
    except DamagedError as error:
        raise DamagedError(f"{error} {artifact.remedy}") from error


def read_model(artifact: ArtifactDir, relpath: str) -> Callable[[str], torch.Tensor]:
    """What reads the tensors of that model one at a time, by name. It raises KeyError where there is none.

    Raises: DamagedError: a file is not as it was written.
    """
    from bmojo.checkpoint_io import check_files, weights_by_name

    folder = artifact.fetch(relpath)
    try:
        check_files(folder)
    except DamagedError as error:
        raise DamagedError(f"{error} {artifact.remedy}") from error
    return weights_by_name(folder)


def load_tokenizer_of(trained: ArtifactDir, reference: str | None) -> Tokenizer:
    """The tokenizer in a folder of an artifact, as a train stage's output refers to it.

    Raises: UserError: there is none. DamagedError.
    """
    from data.tokenizer import load_tokenizer

    if reference is None:
        raise UserError(
            f"{trained.url}: this model was trained on token ids that are no text, so it has no tokenizer. Load it "
            "with bmojo.checkpoint_io.load_pretrained, and give it ids."
        )

    parent, _, folder = reference.rstrip("/").rpartition("/")
    artifact = trained.referred(parent)
    local = artifact.fetch(folder)
    try:
        return load_tokenizer(local)
    except DataError as error:
        raise DamagedError(f"{error} {artifact.remedy}") from error


def placed_for_decoding(model: BMojoLM) -> BMojoLM:
    """The model, moved to the GPU if there is one, and cast to the precision that is used there."""
    from bmojo.model import to_bfloat16
    from pipelines.stages.train import device

    on_gpu = device.num_gpus() > 0
    model.to(device.pick(on_gpu))
    return to_bfloat16(model) if used_precision("auto", on_gpu) == "bf16" else model
