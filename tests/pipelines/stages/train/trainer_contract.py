"""What every backend's Trainer must do, observed on real trainers and judged by test_trainer.py.

The same global batches go through each: 8 sequences with very different numbers of targets, dealt out to the workers as
the data stream does it. So trainers can be compared with one another whatever their number of workers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bmojo import BMojoLM
from data.shards import IGNORED_TARGET, TokenBatch
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.pieces import Read
from pipelines.stages.train.telemetry.norms import GroupNorms
from pipelines.stages.train.trainer import PARAM, Trainer

NUM_SAMPLES, SEQ_LEN, VOCAB_SIZE = 8, 64, 64
NUM_STEPS, HALFWAY = 4, 2
LR = 1e-2

Start = Callable[[BMojoLM, TrainStageConfig], Trainer]
Tensors = dict[str, torch.Tensor]


@dataclass
class Observed:
    """What one worker saw of a trainer. Norms are one per step."""

    norms: list[float] = field(default_factory=list)
    norms_in_one_micro_batch: list[float] = field(default_factory=list)
    norms_of_growing_batches: list[float] = field(default_factory=list)
    loss: float = 0.0  # in the first step
    losses: list[float] = field(default_factory=list)  # from HALFWAY on
    nll_sum: float = 0.0  # of the same batches, before that step
    num_targets: int = 0
    expected_targets: int = 0
    losses_fit_the_targets: bool = False
    shapes_are_those_of_the_tensors: bool = False
    tensors_are_float32: bool = False
    validation_changes_nothing: bool = False
    pieces_cover_each_element_once: bool = False
    pieces_are_those_of_the_tensors: bool = False
    put_back_exactly: bool = False
    resumes_bitwise: bool = False
    rewinds_bitwise: bool = False
    ruined_norm: float = 0.0
    ruined_changes_nothing: bool = False
    goes_on_after_a_ruined_step: bool = False
    group_norms: dict[str, float] = field(default_factory=dict)  # of the first step
    refused_norm: float = 0.0  # of a step whose loss is above its limit
    refused_loss: float = 0.0
    loss_at_its_limit_is_applied: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the way out of a worker process."""
        return asdict(self)


def observe(start: Start, config: TrainStageConfig) -> tuple[Observed, Tensors]:
    """Take steps with trainers of one kind. Returns also the named tensors at the end. A collective.

    Args: config: with global_batch_size NUM_SAMPLES and 4 micro batches per worker and step.
    """
    seen = Observed()
    trainer = start(initial_model(config), config)
    first = micro_batches(config, 0)
    losses = [trainer.token_losses(batch) for batch in first]
    seen.nll_sum = float(sum(loss.double().sum() for loss in losses))
    seen.losses_fit_the_targets = all(
        loss.shape == batch.targets_bt.shape
        and loss.dtype == torch.float32
        and not loss.requires_grad
        and bool(((loss == 0) == (batch.targets_bt == IGNORED_TARGET)).all())
        for loss, batch in zip(losses, first, strict=True)
    )
    start_values = snapshot(trainer)
    seen.validation_changes_nothing = all(
        torch.equal(start_values[f"{PARAM}/{name}"], value) for name, value in initial_model(config).named_parameters()
    )
    result = trainer.step(first, LR)
    seen.loss, seen.num_targets = float(result.loss), int(result.num_targets)
    seen.expected_targets = int((global_batch(0).targets_bt != IGNORED_TARGET).sum())
    seen.norms = [float(result.grad_norm), *steps(trainer, config, range(1, HALFWAY))]
    halfway = snapshot(trainer)
    for number in range(HALFWAY, NUM_STEPS):
        result = trainer.step(micro_batches(config, number), LR)
        seen.norms.append(float(result.grad_norm))
        seen.losses.append(float(result.loss))
    end = snapshot(trainer)
    seen.shapes_are_those_of_the_tensors = {key: value.shape for key, value in end.items()} == dict(trainer.shapes)
    seen.tensors_are_float32 = {value.dtype for value in end.values()} == {torch.float32}
    seen.versions = dict(trainer.versions)

    seen.pieces_cover_each_element_once = covers_once(trainer)
    seen.pieces_are_those_of_the_tensors = all(
        piece.values.dtype == torch.float32
        and torch.equal(piece.values.cpu(), reader(end)(key, piece.start, piece.values.numel()))
        for key, piece in trainer.pieces().items()
    )

    resumed = start(initial_model(config), config)
    resumed.load(reader(halfway), num_steps=HALFWAY)
    seen.put_back_exactly = equal(snapshot(resumed), halfway)
    steps(resumed, config, range(HALFWAY, NUM_STEPS))
    seen.resumes_bitwise = equal(snapshot(resumed), end)

    trainer.load(reader(halfway), num_steps=HALFWAY)
    trainer.token_losses(first[0])
    steps(trainer, config, range(HALFWAY, NUM_STEPS))
    seen.rewinds_bitwise = equal(snapshot(trainer), end)

    watched = start(initial_model(config), config)
    norms = GroupNorms(watched, every_steps=1)
    result = watched.step(first, LR, before_update=norms.watch(1, is_logged=True))
    seen.group_norms = norms.points(float(result.grad_norm))

    whole = config.model_copy(update={"micro_batch_size": NUM_SAMPLES // dist.get_world_size()})
    seen.norms_in_one_micro_batch = steps(start(initial_model(whole), whole), whole, range(NUM_STEPS))

    growing = start(initial_model(config), config)
    for number, size in enumerate((1, 2, 4)):
        result = growing.step(micro_batches(config, number)[:size], LR)
        seen.norms_of_growing_batches.append(float(result.grad_norm))

    embedding = f"{PARAM}/embedding.weight"
    ruined_values = start_values | {embedding: torch.full_like(start_values[embedding], torch.inf)}
    ruined = start(model_with(config, ruined_values), config)
    before = snapshot(ruined)
    seen.ruined_norm = steps(ruined, config, range(1))[0]
    seen.ruined_changes_nothing = equal(snapshot(ruined), before)

    model, factor = initial_model(config), 1.0
    model.embedding.register_forward_hook(lambda *given: given[2] * factor)
    passing = start(model, config)
    steps(passing, config, range(HALFWAY))
    factor = math.nan
    ruined_norms = steps(passing, config, range(7, 9))
    factor = 1.0
    refused = passing.step(micro_batches(config, 8), LR, torch.tensor(0.5, dtype=torch.float64))
    seen.refused_norm, seen.refused_loss = float(refused.grad_norm), float(refused.loss)
    limits = [torch.tensor(math.inf, dtype=torch.float64), torch.tensor(seen.losses[-1], dtype=torch.float64)]
    for number, limit in zip(range(HALFWAY, NUM_STEPS), limits, strict=True):
        seen.loss_at_its_limit_is_applied = math.isfinite(
            float(passing.step(micro_batches(config, number), LR, limit).grad_norm)
        )
    seen.goes_on_after_a_ruined_step = not any(map(math.isfinite, ruined_norms)) and equal(snapshot(passing), end)
    return seen, end


def initial_model(config: TrainStageConfig) -> BMojoLM:
    """The same weights in every process."""
    model = BMojoLM(config.model)
    model.init_weights(seed=0)
    return model


def model_with(config: TrainStageConfig, tensors: Tensors) -> BMojoLM:
    """A model with the parameters among the tensors."""
    model = BMojoLM(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"{PARAM}/{name}"])
    return model


def steps(trainer: Trainer, config: TrainStageConfig, numbers: range) -> list[float]:
    """Take these steps; returns the gradient norms."""
    return [float(trainer.step(micro_batches(config, number), LR).grad_norm) for number in numbers]


def snapshot(trainer: Trainer) -> Tensors:
    """Copies of all named tensors."""
    return {key: trainer.tensor(key).clone() for key in trainer.shapes}


def reader(tensors: Tensors) -> Read:
    """What Trainer.load asks for, out of whole tensors."""
    return lambda key, start, numel: tensors[key].reshape(-1)[start : start + numel]


def covers_once(trainer: Trainer) -> bool:
    """Whether the pieces of all ranks hold each element of each tensor, and none twice. A collective."""
    mine = [(key, piece.start, piece.values.numel()) for key, piece in trainer.pieces().items()]
    of_ranks: list[list[tuple[str, int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    counts = {key: torch.zeros(shape.numel(), dtype=torch.int32) for key, shape in trainer.shapes.items()}
    for key, start, numel in itertools.chain.from_iterable(of_ranks):
        counts[key][start : start + numel] += 1
    return all(bool((count == 1).all()) for count in counts.values())


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether all tensors are the same to the last bit."""
    return left.keys() == right.keys() and all(
        torch.equal(left[key].view(torch.int32), right[key].view(torch.int32)) for key in left
    )


def global_batch(number: int) -> TokenBatch:
    """The global batch of a step: in sample i only the first (i + 1)/8 of the positions have targets."""
    tokens_bt = torch.randint(0, 60, (NUM_SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(number))
    positions_t, samples_b = torch.arange(SEQ_LEN), torch.arange(NUM_SAMPLES)
    has_target_bt = positions_t[None] < (samples_b[:, None] + 1) * SEQ_LEN // NUM_SAMPLES
    targets_bt = torch.where(has_target_bt, tokens_bt.roll(-1, dims=1), IGNORED_TARGET)
    return TokenBatch(tokens_bt, targets_bt, torch.zeros_like(tokens_bt))


def micro_batches(config: TrainStageConfig, number: int) -> list[TokenBatch]:
    """This worker's share of a global batch."""
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    pieces: Iterator[tuple[torch.Tensor, ...]] = zip(
        *(tensor[mine].split(config.micro_batch_size) for tensor in global_batch(number)[:3]), strict=True
    )
    return [TokenBatch(*piece) for piece in pieces]
