"""Whether a training step fits into the memory of its workers, before anything starts."""

from __future__ import annotations

import logging

from base.errors import UserError
from pipelines.engine.provenance import machine
from pipelines.engine.stage import Machines, StageNode
from pipelines.errors import FieldError
from pipelines.stages.tokenize.stage import planned_vocab_size
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU, memory_size
from pipelines.stages.train.planning.hardware import TRAINIUM_2, Hardware, named, of_device
from pipelines.stages.train.planning.memory import MemoryPlan, largest_micro_batch, plan_memory
from pipelines.stages.train.planning.states import model_size
from pipelines.stages.train.planning.words import size
from pipelines.stages.train.stage import TrainStage, padded_vocab_size

_ROUGH_TENSORS = 64  # float32 tensors of (b, t, d) per layer: no model of ours keeps as many
_CLOSE = 0.9  # of the memory: a note

logger = logging.getLogger(__name__)


def sized_training(node: StageNode[TrainStage]) -> tuple[TrainStageConfig, int]:
    """A stage's settings, its model with a vocab_size, and the length of its sequences."""
    train, tokens = node.config, node.inputs.tokens[0]
    model = train.model
    if model.vocab_size is None:
        model = model.with_vocab_size(padded_vocab_size(planned_vocab_size(tokens)))
    return train.model_copy(update={"model": model}), tokens.config.seq_len


def on_gpus(train: TrainStageConfig) -> TrainStageConfig:
    """The same training with a GPU for each worker; on NeuronCores as it is."""
    if train.on_neuron:
        return train
    resources = train.resources.model_copy(update={"gpus_per_worker": 1.0})
    return train.model_copy(update={"resources": resources})


def hardware_of(machines: Machines, train: TrainStageConfig) -> Hardware | None:
    """The GPU that is named, if one is; NeuronCores are of one kind. Raises: UserError: it is not known."""
    if train.on_neuron:
        if machines.hardware not in (None, TRAINIUM_2):
            raise UserError(
                f"--hardware {machines.hardware}: this training runs on NeuronCores, by resources."
                f"neuron_cores_per_worker. Leave it out, or name {TRAINIUM_2}."
            )
        return named(TRAINIUM_2)
    if machines.hardware is None:
        return None
    try:
        return named(machines.hardware)
    except ValueError as error:
        raise UserError(f"--hardware: {error} Add it in {named.__module__}, from its data sheet.") from error


def check_fits(node: StageNode[TrainStage], machines: Machines) -> None:
    """Refuse a step that needs more than a worker's device has, on the smallest group that may train.

    Raises: FieldError: its tensors alone do; names what would lower it. UserError: the hardware is not known.
    """
    train, seq_len = sized_training(node)
    hardware = hardware_of(machines, train)
    if hardware is not None:
        train = on_gpus(train)
    train = train.with_workers(train.group_sizes[0])
    room = room_of(train, hardware)
    if room is None or (hardware is None and _rough_bytes(train, seq_len) < room // 2):
        return  # the activations of a small model need not be worked out
    memory = plan_memory(train, seq_len, None)
    if memory.least > room:
        raise FieldError(("stages", node.name), _too_large(train, seq_len, memory, room, hardware))
    if memory.device > _CLOSE * room:
        logger.warning(
            "%s: a worker will take about %s of %s in a step; it may run out of memory. `bmojo plan` shows the parts.",
            node.name, size(memory.device), size(room),
        )  # fmt: skip


def room_of(train: TrainStageConfig, hardware: Hardware | None) -> int | None:
    """Bytes that a worker's device has: the GPU's, or a worker's part of this machine. None: it is not known."""
    if hardware is None and train.on_gpu:
        hardware = of_device(machine()["gpus"])
    if hardware is not None:
        return hardware.memory_bytes
    return None if train.on_gpu else memory_size(CPU) // train.resources.num_workers


def _rough_bytes(train: TrainStageConfig, seq_len: int) -> int:
    """More than a step takes, as a rule, without running the model."""
    states = train.backend.states(model_size(train), train.resources.num_workers, train.on_gpu, accumulates=True)
    row = 4 * train.worker_micro_batch_size * seq_len
    return states.total + row * (_ROUGH_TENSORS * train.model.d_model * (len(train.model.mixers) + 1))


def _too_large(train: TrainStageConfig, seq_len: int, memory: MemoryPlan, room: int, hardware: Hardware | None) -> str:
    states = memory.parameters + memory.optimizer + memory.buckets + memory.gradients
    advice = []
    fitting = largest_micro_batch(train, seq_len, None, room)
    if fitting is not None:
        advice.append(f"micro_batch_size: {fitting}")
    if train.activation_checkpointing != "block" and memory.activations > states:
        advice.append("activation_checkpointing: block")
    if states > room // 2:
        advice.append(train.backend.memory_advice)
    advice.append("a smaller model, or more memory per worker")
    where = f"A worker on {hardware.name}" if hardware else "A worker here"
    return (
        f"a step needs at least {size(memory.least)} per worker: {size(states)} for weights, gradients and optimizer, "
        f"{size(memory.activations)} for the activations of {train.worker_micro_batch_size} x {seq_len} tokens. "
        f"{where} has {size(room)}. These would lower it: {'; '.join(advice)}."
    )
