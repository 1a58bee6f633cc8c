"""Settings of the `train` stage. What follows from them is a property; nothing is written into them after loading."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from base.config import ADDED_LATER, NOT_IN_FINGERPRINT, StrictConfig
from bmojo import ModelConfig
from bmojo.fields import ActivationCheckpointing
from data.batches import Batches, BatchPhase
from pipelines.engine.fingerprint import config_that_matters
from pipelines.engine.stage import StageConfig
from pipelines.errors import FieldError
from pipelines.stages.precision import used_precision
from pipelines.stages.train.backends.config import AnyBackendConfig, DeepSpeedConfig
from pipelines.stages.train.data import TrainDataConfig
from pipelines.stages.train.guards.config import SpikeAction, SpikeConfig
from pipelines.stages.train.optimizers.config import (
    AdamWConfig,
    GroupConfig,
    MuonConfig,
    OptimizerConfig,
    TransferConfig,
)
from pipelines.stages.train.schedule import CosineSchedule, Position, Schedule
from pipelines.stages.train.telemetry.config import ProfileConfig


class BatchPhaseConfig(StrictConfig):
    """Global batches of one size."""

    size: PositiveInt = Field(description="Sequences per optimizer step, over all workers.")
    steps: PositiveInt = Field(description="For so many steps.")


class StartConfig(StrictConfig):
    """What is taken from the train stage that this one starts from (`initial` in needs)."""

    step: PositiveInt | None = Field(
        None, description="Start from its checkpoint of this step, which it must keep; null: from its end."
    )
    moments: bool = Field(False, description="Take the optimizer's state and its step count too, not weights alone.")
    continue_data: bool = Field(
        False, description="Go on in the data where that checkpoint stood, rather than from the beginning."
    )


class TrainStageConfig(StageConfig):
    """Train a model on the shards of `tokenize` stages, from scratch or from another `train` stage's weights."""

    kind: Literal["train"]
    retries: int = Field(
        3,
        ge=0,
        description="Times that training goes on from its newest checkpoint after a worker's own error (a GPU that "
        "fails, say) or a time-out, counted from 0 again whenever it got further.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    start: StartConfig = Field(
        default_factory=StartConfig,
        description="What to take from the train stage in needs that this one starts from; its final weights.",
        json_schema_extra=ADDED_LATER,
    )
    model: ModelConfig = Field(description="The model. Its vocab_size is taken from the tokenizer where left out.")

    global_batch_size: PositiveInt = Field(description="Sequences per optimizer step, over all workers.")
    micro_batch_size: PositiveInt = Field(
        description="Most sequences that a worker puts through the model at once: it takes the largest divisor of its "
        "share of the batch that is not greater, and accumulates the rest.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    batch_size_warmup: tuple[BatchPhaseConfig, ...] = Field(
        (),
        description="Smaller global batches for the first steps, in their order; then global_batch_size.",
        json_schema_extra=ADDED_LATER,
    )
    max_steps: PositiveInt | None = Field(
        None, le=10**9, description="Optimizer steps to take. Give this or max_tokens."
    )
    max_tokens: PositiveInt | None = Field(
        None, le=10**15, description="Tokens to train on, rounded up to whole steps. Give this or max_steps."
    )

    data: TrainDataConfig = Field(
        default_factory=TrainDataConfig, description="Which tokens are read in which order, and how they come here."
    )

    lr: float = Field(3e-3, gt=0, description="Highest learning rate, reached at the end of the warm-up.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Learning rate at the last step, as a share of lr.")
    warmup_steps: int = Field(100, ge=0, description="Steps over which lr rises linearly from 0.")
    schedule: Schedule = Field(default_factory=CosineSchedule, description="How lr goes on after the warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW: decay rates of the two moments.")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment.")
    weight_decay: float = Field(
        0.1, ge=0, description="AdamW: decoupled decay of matrices; norms and SSM parameters have none."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=AdamWConfig,
        description="What updates the weights: AdamW, or Muon for the matrices inside the layers.",
        json_schema_extra=ADDED_LATER,
    )
    transfer: TransferConfig | None = Field(
        None,
        description="Scale initial values, learning rates and decays from a smaller model's size to this one's.",
        json_schema_extra=ADDED_LATER,
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay rate of a moving average of the weights, which becomes the final model; null: none is kept.",
        json_schema_extra=ADDED_LATER,
    )
    groups: tuple[GroupConfig, ...] = Field(
        (),
        description="Parameters with a learning rate or a decay of their own, by name.",
        json_schema_extra=ADDED_LATER,
    )
    grad_clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 does not clip.")

    max_skipped_steps: int = Field(
        0,
        ge=0,
        description="Steps that training may leave out, in all, because loss or gradients are not finite or for a loss "
        "spike; one more ends it. The curve train/skipped_steps counts them.",
        json_schema_extra=ADDED_LATER,
    )

    spikes: SpikeConfig | None = Field(
        SpikeConfig(),
        description="What a loss far above those before it leads to; null: nothing.",
        json_schema_extra=NOT_IN_FINGERPRINT,  # as such: settled() puts it in, where it can change the result
    )

    check_replicas_every_steps: PositiveInt | None = Field(
        100,
        description="Compare what several workers hold of the same weights every so many steps, and before every "
        "checkpoint; a difference ends the attempt, and the next one resumes. null: before checkpoints only.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    check_documents_every_steps: PositiveInt | None = Field(
        1000,
        description="Check that no document of a row reaches the losses of another one: at the first batch with two "
        "documents in a row, and every so many steps. Costs two forward passes of a row. null: never.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    backend: AnyBackendConfig = Field(
        default_factory=lambda: DeepSpeedConfig(kind="deepspeed"),
        description="What updates the weights, and how it shards them over the workers.",
        json_schema_extra=NOT_IN_FINGERPRINT,  # as such: settled() puts it in, in the backend's own form
    )
    precision: Literal["auto", "fp32", "bf16", "float8"] = Field(
        "auto",
        description="bf16: matrix products in bfloat16 under autocast, parameters and optimizer in float32. "
        "auto: bf16 on a GPU or NeuronCore, fp32 on the CPU. float8: as bf16, and products of the blocks' projections "
        "in float8, on GPUs from Ada and Hopper on; for large models.",
    )
    deterministic: bool = Field(
        True, description="Use deterministic algorithms only, so that a resumed run is bitwise the unbroken one."
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, replay the forward and the backward of a micro batch as CUDA graphs: same results, less "
        "work for the host. Never under ZeRO 3.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        "none",
        description="What the backward pass computes again to save memory, in each layer: next to nothing; norms, "
        "rotations and convolutions, on a GPU (pointwise); the mixer (attention); or the whole block. Same results.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the initial weights and of the order of the data.")

    validate_every_steps: PositiveInt | None = Field(
        None,
        description="Validation loss every so many steps; null: before the first and after the last step only.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    validation_batches: PositiveInt = Field(
        16, description="Global batches of the validation split, from its start, that each validation reads."
    )
    log_every_steps: PositiveInt = Field(
        10, description="Steps between two points of the training curves.", json_schema_extra=NOT_IN_FINGERPRINT
    )
    log_norms_every_steps: PositiveInt | None = Field(
        100,
        description="Norms of weights, gradients and updates by group (embedding, kinds of mixers, MLP, norms, head), "
        "at those points of the training curves whose step this divides; null: none.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    profile: ProfileConfig | None = Field(
        None,
        description="Trace some steps with torch's profiler, into profile/ of the artifact and MLflow; null: none.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    checkpoint_every_steps: PositiveInt = Field(
        100, description="Steps between two checkpoints.", json_schema_extra=NOT_IN_FINGERPRINT
    )
    checkpoint_every_s: PositiveFloat | None = Field(
        None,
        description="Also a checkpoint when the last one is so many seconds ago; null: by steps alone.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    keep_checkpoints: PositiveInt = Field(
        2,
        description="Newest checkpoints kept; older ones are deleted, but for those of keep_every_steps.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    keep_every_steps: PositiveInt | None = Field(
        None,
        description="Checkpoints of steps that this divides are never deleted: to evaluate or export them later. A "
        "multiple of checkpoint_every_steps; null: none.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    grow_after_s: float = Field(
        60,
        ge=0,
        description="Seconds that fewer than num_workers train before they make way for a larger group, if there is "
        "room for one: each change costs a checkpoint and a start.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    collective_timeout_s: float = Field(
        600,
        gt=0,
        description="Seconds a worker waits for the others before it gives them up for dead.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    hang_after_s: float | None = Field(
        None,
        gt=0,
        description="Training in which no worker gets any further for so many seconds hangs: it ends with a report on "
        "which rank waits where, and starts again. null: half of collective_timeout_s.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> TrainStageConfig:
        if (self.max_steps is None) == (self.max_tokens is None):
            found = "neither" if self.max_steps is None else "both"
            raise ValueError(
                f"found {found} of max_steps and max_tokens, expected exactly one: they say how long to train."
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves no step of max_steps={self.max_steps} at full lr; "
                f"set warmup_steps to {self.max_steps // 10} or less, or raise max_steps."
            )
        if self.keep_every_steps is not None and self.keep_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"keep_every_steps={self.keep_every_steps} is not a multiple of checkpoint_every_steps="
                f"{self.checkpoint_every_steps}: there would be no checkpoint to keep at most of those steps. Set it "
                f"to {-(-self.keep_every_steps // self.checkpoint_every_steps) * self.checkpoint_every_steps}."
            )
        if isinstance(self.optimizer, MuonConfig) and self.transfer is not None:
            raise ValueError("transfer scales AdamW's updates, and optimizer.kind is muon. Leave one of them out.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: each must be at least 0 and less than 1.")
        if self.global_batch_size % self.data.paths:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of data.paths={self.data.paths}: each "
                "path gives as many sequences of a batch. Change one of them."
            )
        if self.hang_limit_s >= self.collective_timeout_s:
            raise ValueError(
                f"hang_after_s={self.hang_after_s:g} is not less than collective_timeout_s="
                f"{self.collective_timeout_s:g}, after which the workers give one another up, with no word about who "
                "waits where. Lower it, or raise collective_timeout_s."
            )
        if self.precision == "float8" and not self.on_gpu:
            raise ValueError(
                "precision: float8 is for GPUs, and resources.gpus_per_worker is 0. Use auto, fp32 or bf16."
            )
        self._check_workers()
        self.backend.check(self)
        return self

    def _check_workers(self) -> None:
        total, resources = self.global_batch_size, self.resources
        for phase in self.batch_size_warmup:
            if phase.size % resources.num_workers or phase.size % self.data.paths or phase.size >= total:
                raise ValueError(
                    f"batch_size_warmup: found {phase.size}, expected a multiple of resources.num_workers="
                    f"{resources.num_workers} and of data.paths={self.data.paths} below global_batch_size={total}."
                )
        if total % resources.num_workers == 0:
            return
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        near = max((n for n in divisors if n < resources.num_workers), default=1)
        raise ValueError(
            f"global_batch_size={total} is not a multiple of resources.num_workers={resources.num_workers}: every "
            f"worker takes the same share of a batch. Set resources.num_workers to {near} "
            f"(these divide it: {', '.join(map(str, divisors))}), or change global_batch_size."
        )

    def settled(self) -> dict[str, Any]:
        """The precision that is used (`auto` depends on the resources, which do not count), the backend's part, and
        spikes, unless they are only told."""
        acts_on_spikes = self.spikes is not None and self.spikes.action is not SpikeAction.REPORT
        spikes = {"spikes": config_that_matters(self.spikes)} if self.spikes is not None and acts_on_spikes else {}
        return {"precision": self._used_precision, **self.backend.hashed(), **spikes}

    @property
    def on_gpu(self) -> bool:
        """Workers compute on GPUs."""
        return self.resources.gpus_per_worker > 0

    @property
    def on_accelerator(self) -> bool:
        """Workers compute on GPUs or NeuronCores."""
        return self.on_gpu or self.on_neuron

    @property
    def on_neuron(self) -> bool:
        """Workers compute on NeuronCores."""
        return self.resources.neuron_cores_per_worker > 0

    @property
    def threads_per_worker(self) -> int:
        """Threads that a worker on the CPU computes with."""
        return max(1, int(self.resources.cpus_per_worker))

    @property
    def autocast_bf16(self) -> bool:
        """Matrix products run in bfloat16, or in float8; parameters stay in float32 in any case."""
        return self._used_precision in ("bf16", "float8")

    @property
    def trains_in_float8(self) -> bool:
        """Products of the blocks' projections run in float8, and other products in bfloat16."""
        return self.precision == "float8"

    @property
    def _used_precision(self) -> str:
        return "float8" if self.precision == "float8" else used_precision(self.precision, self.on_accelerator)

    @property
    def hang_limit_s(self) -> float:
        """Seconds without any progress after which training hangs."""
        return self.collective_timeout_s / 2 if self.hang_after_s is None else self.hang_after_s

    @property
    def worker_batch_size(self) -> int:
        """Sequences per optimizer step and worker, once batches have their full size."""
        return self.global_batch_size // self.resources.num_workers

    @property
    def worker_micro_batch_size(self) -> int:
        """Sequences that a worker puts through the model at once in training. Validation uses micro_batch_size."""
        share = self.batches().common_divisor // self.resources.num_workers
        return next(n for n in range(min(self.micro_batch_size, share), 0, -1) if share % n == 0)

    @property
    def accumulation_steps(self) -> int:
        """Micro batches a worker takes per optimizer step, once batches have their full size."""
        return self.worker_batch_size // self.worker_micro_batch_size

    def batches(self, first_position: int = 0) -> Batches:
        """The positions that each step reads. Args: first_position: in the data, of the first step."""
        phases = [BatchPhase(phase.size, phase.steps) for phase in self.batch_size_warmup]
        return Batches(self.global_batch_size, phases, first_position)

    def num_samples(self, num_steps: int) -> int:
        """Sequences in so many steps."""
        return self.batches().start(num_steps)

    @property
    def group_sizes(self) -> list[int]:
        """Numbers of workers that may train together, ascending: those allowed that divide the global batch."""
        return [
            n
            for n in range(self.resources.fewest_together, self.resources.num_workers + 1)
            if self.batches().common_divisor % n == 0
        ]

    def with_workers(self, num_workers: int) -> TrainStageConfig:
        """The same training on so many workers, one of group_sizes."""
        resources = self.resources.model_copy(update={"num_workers": num_workers, "min_workers": None})
        return self.model_copy(update={"resources": resources})

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1 to `num_steps`.

        Rises linearly over warmup_steps (step warmup_steps has the full lr), then follows the schedule.
        """
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        return self.lr * self.schedule.share(Position(step, self.warmup_steps, num_steps, self.min_lr_ratio))

    def num_steps(self, seq_len: int) -> int:
        """Optimizer steps in all, for sequences of `seq_len` tokens."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return self.batches().step_at(-(-self.max_tokens // seq_len))


def check_seq_len(train: TrainStageConfig, seq_len: int, name: str, tokens_name: str) -> None:
    """Refuse a model that cannot read sequences of `seq_len` tokens, or a warm-up longer than they make training.

    Args: name, tokens_name: of the two stages.
    Raises: FieldError: names both fields and the lengths that would do.
    """
    for field, size in train.model.length_rules:
        if seq_len % size:
            near = [n for n in (seq_len // size * size, -(-seq_len // size) * size) if n]
            raise FieldError(
                ("stages", tokens_name, "seq_len"),
                f"seq_len={seq_len} is not a multiple of {name}.model.{field}={size}: the chunked layers need whole "
                f"chunks. Set seq_len to {' or '.join(map(str, near))}, or {field} to a divisor of {seq_len}.",
            )
    try:
        train.backend.check_seq_len(seq_len)
    except ValueError as error:
        raise FieldError(("stages", tokens_name, "seq_len"), f"{name}: {error}") from error
    if train.max_tokens is not None and train.warmup_steps >= train.num_steps(seq_len):
        steps = train.num_steps(seq_len)
        raise FieldError(
            ("stages", name, "warmup_steps"),
            f"warmup_steps={train.warmup_steps} leaves no step at full lr: max_tokens={train.max_tokens} is "
            f"{steps} steps of {train.global_batch_size} x {seq_len} tokens. Set warmup_steps to {steps // 10} or "
            "less, or raise max_tokens.",
        )
