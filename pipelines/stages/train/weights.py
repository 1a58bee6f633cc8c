"""The model's weights before the first step and after the last."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from base.errors import DamagedError, UserError
from bmojo import BMojoLM, ModelConfig
from bmojo.checkpoint_io import CONFIG_NAME, plan_shards, write_digests, write_settings
from bmojo.hollow import fill_empty, fill_from, fill_initial, hollow_model
from bmojo.tensor_file import TensorFile, TensorSpec
from pipelines.stages.models import load_model, read_model
from pipelines.stages.train.checkpoint import BadCheckpointError, Checkpoint, verify
from pipelines.stages.train.guards.pulse import beat, patiently
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.optimizers.transfer import scale_initial_values, scaled_parts
from pipelines.stages.train.trainer import PARAM, Trainer
from pipelines.storage.artifact import ArtifactDir

MODEL = "model"
PREFIX = f"{PARAM}/"


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
            raise _unfit(source, str(error)) from error
    else:
        model.init_weights(job.config.seed)
        scale_initial_values(model, job.config.transfer)
    return model


def model_in_parts(job: TrainJob) -> tuple[BMojoLM, Iterator[nn.Module]]:
    """The same model for a backend that shards parameters: without values, and what sets them, part by part.

    Raises: UserError, while it is iterated: another stage's weights do not fit the model.
    """
    model = hollow_model(job.model)
    model.checkpoint_activations(job.config.activation_checkpointing)
    if job.resume_step is not None or (job.start is not None and job.start.step is not None):
        return model, fill_empty(model)
    if job.start is not None:
        return model, _filled_from(model, job.start.artifact)
    return model, scaled_parts(model, fill_initial(model, job.config.seed), job.config.transfer)


def _filled_from(model: BMojoLM, artifact: ArtifactDir) -> Iterator[nn.Module]:
    source = f"{artifact.url}/{MODEL}"
    read = read_model(artifact, MODEL)

    def read_fitting(name: str) -> torch.Tensor:
        expected = tuple(model.get_parameter(name).shape)
        try:
            found = read(name)
        except KeyError:
            raise _unfit(source, f"there is no {name}") from None
        if tuple(found.shape) != expected:
            raise _unfit(source, f"{name} is {tuple(found.shape)}, expected {expected}")
        return found

    return fill_from(model, read_fitting)


def _unfit(source: str, what: str) -> UserError:
    return UserError(
        f"The weights in {source} do not fit train.model: {what}. Give this stage the model settings of the train "
        "stage it starts from; only window, chunk and eidetic sizes may differ."
    )


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
    """Write the trainer's weights as the final model, its files shared out among the ranks. A collective.

    Tensors are gathered one at a time, so no process holds the model.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shapes = {key.removeprefix(PREFIX): shape for key, shape in trainer.shapes.items() if key.startswith(PREFIX)}
    sizes = {name: shape.numel() * torch.float32.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes)
    folder = job.artifact.local / MODEL
    if rank == 0 and job.artifact.exists(MODEL):
        job.artifact.delete(MODEL)  # of an attempt that ended in the middle of this
    dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    for number, (name, tensors) in enumerate(shards.items()):
        specs = {tensor: TensorSpec(tuple(shapes[tensor])) for tensor in tensors}
        file = TensorFile(folder / name, specs) if number % num_ranks == rank else None
        for tensor in tensors:
            beat("writes the model")
            values = trainer.tensor(PREFIX + tensor)
            if file is not None:
                file.write(tensor, values)
        if file is not None:
            digests[name] = file.close().sha256
            with patiently("uploads the model"):
                job.artifact.publish(f"{MODEL}/{name}")
    of_ranks: list[dict[str, str]] = [{} for _ in range(num_ranks)]
    dist.all_gather_object(of_ranks, digests)
    if rank == 0:
        write_settings(job.model, sizes, shards, folder)
        write_digests(folder, {name: digest for of_rank in of_ranks for name, digest in of_rank.items()})
        job.artifact.publish(MODEL)
    dist.barrier()
