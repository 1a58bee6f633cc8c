"""Where a training starts that goes on from another train stage: which checkpoint, and what is taken from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from base.errors import DamagedError, UserError
from pipelines.errors import FieldError
from pipelines.stages.train.layout import complete_steps, step_dir
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    import torch

    from pipelines.engine.stage import StageNode
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.stage import TrainInputs, TrainStage
    from pipelines.stages.train.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """Attributes:
    artifact: of the other train stage.
    step: the checkpoint that weights are read from; None: the final model.
    with_moments: optimizer state is taken too, and the optimizer's steps are counted on.
    data: where that checkpoint's data stream stood, to go on in it; None: the data from the beginning.
    """

    artifact: ArtifactDir
    step: int | None = None
    with_moments: bool = False
    data: dict[str, Any] | None = None

    @property
    def first_position(self) -> int:
        """In the data, of the first step."""
        return 0 if self.data is None else int(self.data["num_samples"])


def check_start(name: str, config: TrainStageConfig, inputs: TrainInputs) -> None:
    """Refuse a start that the other stage's settings already rule out. Raises FieldError."""
    start, initial = config.start, inputs.initial
    if start == type(start)():
        return
    path = ("stages", name, "start")
    if initial is None:
        raise FieldError(path, "is of another train stage, and needs names none. Add it: needs: {initial: STAGE, ...}.")
    if start.step is not None:
        _check_step((*path, "step"), start.step, initial)
    if start.moments and config.optimizer.kind != initial.config.optimizer.kind:
        raise FieldError(
            (*path, "moments"),
            f"{initial.name!r} is trained by {initial.config.optimizer.kind}, and {name!r} by {config.optimizer.kind}: "
            "their moments are different things. Give both one optimizer, or leave moments out.",
        )
    if start.continue_data:
        differing = [field for field, (here, there) in _order(config, inputs, initial).items() if here != there]
        if differing:
            raise FieldError(
                (*path, "continue_data"),
                f"{name!r} and {initial.name!r} read different samples, by: {', '.join(differing)}. Give both the "
                "same, or leave continue_data out to read from the beginning.",
            )


def _order(config: TrainStageConfig, inputs: TrainInputs, initial: StageNode[TrainStage]) -> dict[str, tuple[Any, Any]]:
    """What the order of samples follows from: here, and in the stage that this one starts from."""
    both = config, initial.config
    tokens: Sequence[tuple[str, ...]] = [tuple(node.name for node in one.tokens) for one in (inputs, initial.inputs)]
    fields = {
        field: [getattr(one.data, field) for one in both] for field in ("weights", "paths", "shuffle_block_samples")
    }
    return {
        "needs": (tokens[0], tokens[1]),
        "seed": (config.seed, initial.config.seed),
        "data.curriculum": ((), config.data.curriculum or initial.config.data.curriculum),
        **{f"data.{field}": (here, there) for field, (here, there) in fields.items()},
    }


def _check_step(path: tuple[str, ...], step: int, initial: StageNode[TrainStage]) -> None:
    there = initial.config
    last = there.num_steps(initial.inputs.tokens[0].config.seq_len)
    if step > last:
        raise FieldError(path, f"found {step}, but {initial.name!r} trains for {last} steps. Leave it out for its end.")
    oldest = last - last % there.checkpoint_every_steps - (there.keep_checkpoints - 1) * there.checkpoint_every_steps
    by_number = there.keep_every_steps is not None and step % there.keep_every_steps == 0
    by_age = step == last or (step >= oldest and step % there.checkpoint_every_steps == 0)
    if not by_number and not by_age and there.checkpoint_every_s is None:
        raise FieldError(
            path,
            f"found {step}, but {initial.name!r} does not keep a checkpoint of that step. Set its keep_every_steps to "
            f"a divisor of {step} that is a multiple of its checkpoint_every_steps={there.checkpoint_every_steps}.",
        )


def start_of(name: str, config: TrainStageConfig, initial: StageNode[TrainStage] | None) -> Start | None:
    """What to start from; None: new weights. Raises UserError: there is no such checkpoint."""
    if initial is None:
        return None
    wanted = config.start
    if wanted.step is None and not wanted.moments and not wanted.continue_data:
        return Start(initial.artifact)
    from pipelines.stages.train.checkpoint import read_state

    kept = sorted(complete_steps(initial.artifact))
    step = wanted.step or initial.output.steps
    if step not in kept:
        raise UserError(
            f"stages.{name}.start.step: found {step}, but {initial.name!r} keeps no checkpoint of that step. It keeps: "
            f"{', '.join(map(str, kept)) or 'none'}. Give one of these."
        )
    data = read_state(initial.artifact, step).data if wanted.continue_data else None
    return Start(initial.artifact, step, wanted.moments, data)


def load_start(trainer: Trainer, start: Start) -> int:
    """Put what is taken from the checkpoint into the trainer. Returns the optimizer's steps so far. A collective.

    Raises: UserError: it does not fit the model or the optimizer. DamagedError: a file is not as it was written.
    """
    from pipelines.stages.train.checkpoint import BadCheckpointError, Checkpoint
    from pipelines.stages.train.optimizers.average import EMA
    from pipelines.stages.train.trainer import PARAM

    assert start.step is not None
    directory = start.artifact.fetch(step_dir(start.step))
    try:
        checkpoint = Checkpoint(directory)
        sizes = checkpoint.sizes()
        taken = [key for key in trainer.shapes if start.with_moments or key.startswith(f"{PARAM}/")]
        has_averages = any(key.startswith(f"{EMA}/") for key in sizes)
        for key in taken:
            found, expected = sizes.get(key, 0), trainer.shapes[key].numel()
            if found != expected and (has_averages or not key.startswith(f"{EMA}/")):
                raise UserError(
                    f"The checkpoint in {directory} does not fit train.model or train.optimizer: of {key} it holds "
                    f"{found:,} elements, expected {expected:,}. Give this stage the settings of the train stage it "
                    "starts from; only window, chunk and eidetic sizes may differ. Or leave start.moments out."
                )

        def read(key: str, at: int, numel: int) -> torch.Tensor:
            prefix, name = key.split("/", 1)
            if prefix == EMA and not (start.with_moments and has_averages):
                return checkpoint.read(f"{PARAM}/{name}", at, numel)  # the average so far
            if prefix == PARAM or start.with_moments:
                return checkpoint.read(key, at, numel)
            return checkpoint.read(f"{PARAM}/{name}", at, numel).zero_()

        num_steps = checkpoint.state.optimizer_steps if start.with_moments else 0
        trainer.load(read, num_steps)
    except BadCheckpointError as error:
        raise DamagedError(f"{error}. It belongs to the stage that this one starts from.") from error
    return num_steps
