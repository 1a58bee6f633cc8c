"""The trainer on DeepSpeed ZeRO: build the engine, take steps, give out and take back named tensors in pieces.

The module is never cast: parameters, gradients and optimizer state are float32 under every precision and bf16 means
autocast around the forward (docs/design/0021). DeepSpeed's own checkpoints are not used (docs/design/0020).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from base.errors import UserError
from bmojo import BMojoLM, float32_names
from bmojo.float8 import train_in_float8
from bmojo.graphs import GraphedLoss, Loss, uncached
from data.shards import TokenBatch
from pipelines.stages.train.backends.config import DeepSpeedConfig
from pipelines.stages.train.backends.named import NamedTensors
from pipelines.stages.train.backends.zero import layout_of
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import has_graphs
from pipelines.stages.train.guards.pulse import beat
from pipelines.stages.train.optimizers.average import WeightAverage
from pipelines.stages.train.optimizers.build import build_optimizer, new_state, state_names
from pipelines.stages.train.optimizers.groups import set_lr
from pipelines.stages.train.optimizers.muon import MOMENTUM, Muon
from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.telemetry.times import Part, StepTimes
from pipelines.stages.train.trainer import (
    PARAM,
    BeforeUpdate,
    StepResult,
    count_targets,
    mean_loss,
    refused_above,
    to_device,
)


class Objective(nn.Module):
    """The model with its loss inside, so that DeepSpeed's hooks see one forward that returns one tensor."""

    def __init__(self, model: BMojoLM, device: torch.device, as_graphs: bool) -> None:
        super().__init__()
        self.model = model
        self._loss: Loss = self._loss_of
        if has_graphs(device):
            self._loss = GraphedLoss(self._loss_of, list(model.parameters())) if as_graphs else uncached(self._loss_of)

    def forward(
        self,
        tokens_bt: torch.Tensor,
        targets_bt: torch.Tensor,
        doc_ids_bt: torch.Tensor,
        wanted_bt: torch.Tensor | None = None,
        token_losses: bool = False,
    ) -> torch.Tensor:
        """The training loss, a scalar; with `token_losses` the pure NLL of each target (b, t), 0 where ignored."""
        if not token_losses:
            marks = () if wanted_bt is None else (wanted_bt,)
            return self._loss(tokens_bt, targets_bt, doc_ids_bt, *marks)
        nll_bt: torch.Tensor | None = self.model(
            tokens_bt, targets_bt, doc_ids_bt, token_losses=True, wanted_bt=wanted_bt
        ).nll_bt
        assert nll_bt is not None
        return nll_bt

    def _loss_of(
        self,
        tokens_bt: torch.Tensor,
        targets_bt: torch.Tensor,
        doc_ids_bt: torch.Tensor,
        wanted_bt: torch.Tensor | None = None,
    ) -> torch.Tensor:
        loss: torch.Tensor | None = self.model(tokens_bt, targets_bt, doc_ids_bt, wanted_bt=wanted_bt).loss
        assert loss is not None
        return loss


class DeepSpeedTrainer(NamedTensors):
    """A model under DeepSpeed ZeRO; see Trainer."""

    def __init__(
        self,
        model: BMojoLM,
        config: TrainStageConfig,
        backend: DeepSpeedConfig,
        device: torch.device,
        parts: Iterable[nn.Module] = (),
    ) -> None:
        """Args: see BackendConfig.start."""
        _quieten_logs()
        _init_communication(device, config.collective_timeout_s)
        backend = sharding(backend, device)
        self.device = self.exact_device = device
        self.times = StepTimes(device)
        if config.trains_in_float8:
            use_float8(model, device)
        self.model = model
        self.optimizer = build_optimizer(model, config)
        self._params = dict(model.named_parameters())
        self._state_names = state_names(model, config)
        self._float32 = float32_names(model)
        self._grad_clip = config.grad_clip
        self._zero_stage = backend.zero_stage
        settings = deepspeed_config(config, backend)
        for part in parts:
            beat("sets initial values")
            if self._zero_stage == 3:  # else it keeps them
                deepspeed.zero.Init(module=part, config_dict_or_path=settings, dtype=torch.float32)
        as_graphs = config.cuda_graphs and backend.zero_stage < 3
        self._engine, _, _, _ = deepspeed.initialize(
            model=Objective(model, device, as_graphs),
            optimizer=self.optimizer,
            config=settings,
            dist_init_required=False,
        )
        if self._zero_stage == 0 and dist.get_world_size() == 1:
            self._engine.enable_backward_allreduce = False  # it would copy every gradient to add it to nothing
        self._measure_communication()
        self._layout = layout_of(self._zero_stage, self._engine, self._params)
        self._make_optimizer_state()
        self._average = (
            None
            if config.ema_decay is None
            else WeightAverage(config.ema_decay, self._layout.updated, self.optimizer.state)
        )
        self._check_dtypes()

    @property
    def versions(self) -> dict[str, str]:
        """See Trainer."""
        return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}

    def step(
        self,
        micro_batches: Sequence[TokenBatch],
        lr: float,
        loss_limit: torch.Tensor | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> StepResult:
        """See Trainer."""
        with self.times.part(Part.COMMUNICATION):
            targets = count_targets(micro_batches, self.device)
        # DeepSpeed averages over workers and micro batches; with these weights every token of the global batch
        # counts the same.
        scale = dist.get_world_size() * len(micro_batches) / targets.total.double()
        micro_batch_size = self._engine.train_micro_batch_size_per_gpu()
        self._engine.set_train_batch_size(len(micro_batches) * micro_batch_size * dist.get_world_size())
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        step_loss, grad_norm = loss_sum, None
        for number, (batch, num_targets) in enumerate(zip(micro_batches, targets.of_micro_batches, strict=True), 1):
            beat("computes a micro batch")
            # Said, as batches may grow: DeepSpeed would count all micro batches so far.
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self.times.part(Part.FORWARD):
                loss: torch.Tensor = self._engine(*to_device(batch, self.device))
            loss_sum += loss.detach().double() * num_targets
            if number == len(micro_batches):
                with self.times.part(Part.COMMUNICATION):
                    step_loss = mean_loss(loss_sum, targets.total)
                scale = refused_above(loss_limit, step_loss, scale)
            with self.times.part(Part.BACKWARD):
                self._engine.backward(loss * (num_targets * scale).to(loss.dtype))
            with self.times.part(Part.OPTIMIZER), self._watched(before_update):
                grad_norm = self._finish_micro_batch(lr)
        assert grad_norm is not None, "the last micro batch of a step must update the weights"
        return StepResult(step_loss, targets.total, grad_norm)

    def token_losses(self, batch: TokenBatch) -> torch.Tensor:
        """See Trainer."""
        self._engine.eval()
        with torch.no_grad():
            nll_bt: torch.Tensor = self._engine(*to_device(batch, self.device), token_losses=True)
        self._engine.train()
        return nll_bt

    def tensor(self, key: str) -> torch.Tensor:
        """See Trainer."""
        prefix, name = key.split("/", 1)
        if self._zero_stage == 0:
            return self._kept(prefix, self._layout.held[name]).view(self.shapes[key])
        return super().tensor(key)

    def replicas(self) -> dict[str, torch.Tensor]:
        """See Trainer. Of stages 1 and 2 the parameters, which each step gathers from their partitions."""
        if self._zero_stage == 0:
            return {key: self.tensor(key) for key in self.shapes}
        return {f"{PARAM}/{name}": p.detach() for name, p in self._params.items()} if self._zero_stage < 3 else {}

    def _finish_micro_batch(self, lr: float) -> torch.Tensor | None:
        """Count a micro batch; after the last one of a step, update the weights and return the gradient norm."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        set_lr(self.optimizer.param_groups, lr)
        if self._zero_stage == 0:
            return self._step_unsharded()
        self._engine.step()
        if not self._engine.was_step_applied():
            return torch.tensor(math.inf, dtype=torch.float64)
        if self._average is not None:
            self._average.update()
        return torch.tensor(float(self._engine.get_global_grad_norm()), dtype=torch.float64)

    @contextmanager
    def _watched(self, before_update: BeforeUpdate | None) -> Iterator[None]:
        """Show gradients where the optimizer is about to use them; ZeRO calls it once for each group."""
        if before_update is None:
            yield
            return
        own = self._layout.own.items()

        def show(*_: Any) -> None:
            before_update(
                {name: Piece(at.start, at.of(at.updated.grad)) for name, at in own if at.updated.grad is not None}
            )

        hook = self.optimizer.register_step_pre_hook(show)
        try:
            yield
        finally:
            hook.remove()

    @property
    def _whole_shapes(self) -> dict[str, torch.Size]:
        """Of the parameters. Under ZeRO 3 one itself is empty between uses; `ds_shape` is its whole shape."""
        return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self._params.items()}

    def _make_optimizer_state(self) -> None:
        """Make the state that the optimizer would make at its first step, and tell it where parameters are."""
        held = self._layout.held
        for name, place in held.items():
            if place.updated not in self.optimizer.state:
                self.optimizer.state[place.updated] = new_state(place.updated, self._state_names[name])
        if isinstance(self.optimizer, Muon):
            matrices = [name for name, names in self._state_names.items() if MOMENTUM in names]
            self.optimizer.attach({name: self._whole_shapes[name] for name in matrices}, held, self._layout.updated)

    def _step_unsharded(self) -> torch.Tensor:
        """Update the weights unless the norm is not finite, which the device alone looks at."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, norm)
        # If it is 1, torch's fused AdamW changes nothing.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]  # as GradScaler sets it
        self._engine.step()
        if self._average is not None:
            self._average.update(torch.isfinite(norm).double())
        return norm

    def _measure_communication(self) -> None:
        """Tell DeepSpeed's reduction of gradients apart from the backward that calls it at its end.

        What ZeRO 2 and 3 reduce or gather earlier, in hooks of the backward and the forward, counts with these.
        """
        reduce = self._engine.allreduce_gradients

        def measured(*args: Any, **options: Any) -> None:
            with self.times.part(Part.COMMUNICATION):
                reduce(*args, **options)

        self._engine.allreduce_gradients = measured

    def _check_dtypes(self) -> None:
        wrong = {name: p.dtype for name, p in self._params.items() if p.dtype != torch.float32}
        if wrong:
            ssm = [name for name in wrong if name in self._float32]
            raise RuntimeError(
                f"parameters are not float32 after DeepSpeed started: {wrong}; among them of the SSM: {ssm}."
            )


def use_float8(model: BMojoLM, device: torch.device) -> None:
    """Train its projections in float8. Raises UserError: the device or the model's widths do not allow it."""
    try:
        train_in_float8(model, device)
    except ValueError as error:
        raise UserError(f"train.precision is float8: {error}") from error


def sharding(backend: DeepSpeedConfig, device: torch.device) -> DeepSpeedConfig:
    """The settings that are used: on one GPU there is nothing to shard, and ZeRO would wait for every step's overflow.

    On the CPU, where it waits for nothing, training keeps its bits.
    """
    if device.type == "cpu" or dist.get_world_size() > 1 or backend.offload is not None:
        return backend
    return backend.model_copy(update={"zero_stage": 0})


def deepspeed_config(config: TrainStageConfig, backend: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for ours."""
    on_gpu = config.on_gpu
    zero: dict[str, Any] = {
        "stage": backend.zero_stage,
        # On the CPU a collective cannot overlap with computing on the same cores, and contiguous buckets only add
        # copies; none of these settings gains anything there (measured: docs/design/0021).
        "overlap_comm": on_gpu,
        "contiguous_gradients": on_gpu or backend.zero_stage == 3,
        "reduce_scatter": on_gpu,
        "round_robin_gradients": on_gpu and backend.zero_stage in (1, 2),
        "compute_grad_norm": True,  # it is what finds gradients that are not finite, in every precision of ours
    }
    if backend.zero_stage == 3:
        # Whole layers at a time: the model is small beside what ZeRO 3 is made for.
        zero["stage3_param_persistence_threshold"] = 10_000
    if backend.offload is not None:
        if backend.offload.optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if backend.offload.parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    result: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.worker_micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        # Without ZeRO we clip ourselves: DeepSpeed then keeps the norm to itself. It clips by 1.0 if nothing is said.
        "gradient_clipping": config.grad_clip if backend.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before and after every micro batch
    }
    if config.autocast_bf16:
        # No module is named as safe for bfloat16 *communication*: gradients are reduced in float32.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return result


def _quieten_logs() -> None:
    """Keep DeepSpeed from telling every rank's console about its start; warnings and errors still pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _init_communication(device: torch.device, timeout_s: float) -> None:
    """Attach DeepSpeed to the process group that Ray Train made, and give its own group the same time-out.

    DeepSpeed clones the group of all workers, with torch's default: 10 minutes for NCCL, 30 for gloo.

    On the CPU it would first compile a shared-memory all-reduce meant for inference (45 s and a C++ compiler);
    training never calls it, so it is marked as unavailable. gloo does the work.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), groups._clone_world_group())
