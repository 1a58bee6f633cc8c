"""The model's weights before the first step and after the last."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from base.errors import DamagedError, UserError
from bmojo import BMojoLM, ModelConfig
from bmojo.checkpoint_io import CONFIG_NAME, save_pretrained
from pipelines.stages.models import load_model
from pipelines.stages.train.checkpoint import BadCheckpointError, Checkpoint, verify
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.trainer import PARAM, Trainer
from pipelines.storage.artifact import ArtifactDir

MODEL = "model"


def build_model(job: TrainJob) -> BMojoLM:
    """The model on the CPU with the weights that training starts from, the same on every rank.

    A run that resumes loads others into its trainer, so any will do for it.
    Raises: UserError: another stage's weights do not fit the model.
    """
    model = BMojoLM(job.model)
    model.checkpoint_activations(job.config.activation_checkpointing)
    if job.resume_step is not None:
        return model
    if job.start is not None and job.start.step is not None:
        return model  # load_start follows
    if job.start is not None:
        source = f"{job.start.artifact.url}/{MODEL}"
        initial = load_model(job.start.artifact, MODEL)
        try:
            model.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"The weights in {source} do not fit train.model: {error}. Give this stage the model settings of the "
                "train stage it starts from; only window, chunk and eidetic sizes may differ."
            ) from error
    else:
        model.init_weights(job.config.seed)
    return model


def load_checkpoint(artifact: ArtifactDir, path: str, step: int) -> BMojoLM:
    """The model of a kept checkpoint, on the CPU. Args: path: folder of the final model, whose settings are the same.

    Raises: DamagedError: a file is not as it was written.
    """
    settings = artifact.fetch(path) / CONFIG_NAME
    directory = artifact.fetch(step_dir(step))
    try:
        verify(directory)
        checkpoint = Checkpoint(directory)
        model = BMojoLM(ModelConfig.model_validate_json(settings.read_text()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.view(-1).copy_(checkpoint.read(f"{PARAM}/{name}", 0, parameter.numel()))
    except BadCheckpointError as error:
        raise DamagedError(
            f"{error}. Evaluate another step: the stage that trained does not write it again."
        ) from error
    return model


def save_model(job: TrainJob, trainer: Trainer) -> None:
    """Write the trainer's weights as the final model. A collective."""
    names = [key.removeprefix(f"{PARAM}/") for key in trainer.shapes if key.startswith(f"{PARAM}/")]
    weights = {name: trainer.tensor(f"{PARAM}/{name}") for name in names}
    if dist.get_rank() == 0:
        model = BMojoLM(job.model)
        _set_parameters(model, weights.items(), "the trainer")
        save_pretrained(model, job.artifact.local / MODEL)
        job.artifact.publish(MODEL)
    dist.barrier()


def _set_parameters(model: BMojoLM, values: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values:
            parameters.pop(name).copy_(value)
    if parameters:
        raise RuntimeError(f"{source}: holds no value of {', '.join(parameters)}.")
