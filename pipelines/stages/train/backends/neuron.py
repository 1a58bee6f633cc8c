"""The trainer on TorchNeuron, in plain torch: zero1 or fsdp2 around compiled blocks (docs/design/0070).

The loss is never scaled before its backward: compiled graphs of the beta gave other gradients then, unless the factor
was a power of two. Gradients are weighted and divided afterwards. The device sees float32 and int32 only; numbers of 64
bits are the host's. Once in a step the host waits for losses and norms, and decides on the update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.compiled import compile_parts
from data.shards import IGNORED_TARGET, TokenBatch
from pipelines.neuron import runtime
from pipelines.stages.train.backends.named import NamedTensors
from pipelines.stages.train.backends.neuron_config import NeuronConfig
from pipelines.stages.train.backends.neuron_sharding import sharding_of
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import autocast, copy_to, exact_device
from pipelines.stages.train.guards.pulse import beat
from pipelines.stages.train.optimizers.average import WeightAverage
from pipelines.stages.train.optimizers.build import new_state, optimizer_of, state_names
from pipelines.stages.train.optimizers.groups import parameter_groups, set_lr
from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.telemetry.times import Part, StepTimes
from pipelines.stages.train.trainer import PARAM, BeforeUpdate, StepResult, count_targets, mean_loss

_STEPS_WATCHED = 2  # for operators that fall back: the first compiles, the second has the optimizer's state

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


class NeuronTrainer(NamedTensors):
    """A model on a NeuronCore, or rehearsed on the CPU; see Trainer."""

    def __init__(
        self,
        model: BMojoLM,
        config: TrainStageConfig,
        backend: NeuronConfig,
        device: torch.device,
        compile: Callable[[Function], Function] | None = None,
    ) -> None:
        """Args: see BackendConfig.start. compile: of a block; None: TorchNeuron's, and on the CPU none."""
        self.device, self.exact_device = device, exact_device(device)
        self.times, self.model = StepTimes(device), model
        self._backend, self._autocast_bf16 = backend, config.autocast_bf16
        self._grad_clip, self._rows = config.grad_clip, config.worker_micro_batch_size
        self._num_tokens: int | None = None  # of a row of the first batch, as which all others must be
        self._state_names = state_names(model, config)
        groups = _with_names(parameter_groups(model, config), model)
        self._layout = self._sharding = sharding_of(backend.parallel, model, device)
        if backend.compile == "blocks" and compile is None and device.type == runtime.TYPE:
            compile = runtime.compiler()
        compile_parts(model, compile or _as_it_is)  # parts take and give tensors, as fully_shard must find them
        held = self._layout.held
        self.optimizer: torch.optim.Optimizer = optimizer_of(
            [{**group, "params": [held[name].updated for name in group["params"] if name in held]} for group in groups],
            config,
        )
        for name, place in held.items():
            self.optimizer.state[place.updated] = dict(new_state(place.updated, self._state_names[name]))
        self._average = None
        if config.ema_decay is not None:
            self._average = WeightAverage(config.ema_decay, self._layout.updated, self.optimizer.state)
        self._num_steps = 0

    @property
    def versions(self) -> dict[str, str]:
        """See Trainer."""
        own = {runtime.PACKAGE: runtime.version()} if self.device.type == runtime.TYPE else {}
        return {"torch": torch.__version__, **own}

    @property
    def _whole_shapes(self) -> dict[str, torch.Size]:
        return self._sharding.shapes

    def step(
        self,
        micro_batches: Sequence[TokenBatch],
        lr: float,
        loss_limit: torch.Tensor | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> StepResult:
        """See Trainer."""
        with self.times.part(Part.COMMUNICATION):
            targets = count_targets(micro_batches, self.exact_device)
        losses: list[torch.Tensor] = []
        for batch, num_targets in zip(micro_batches, targets.of_micro_batches, strict=True):
            beat("computes a micro batch")
            inputs = self._on_device(batch)
            with self.times.part(Part.FORWARD):
                loss = self._loss(inputs)
            losses.append(loss.detach())
            self._sharding.begin_backward(num_targets)
            with self.times.part(Part.BACKWARD):
                loss.backward()
            self._sharding.end_backward()
        with self.times.part(Part.COMMUNICATION):
            gradients = self._sharding.take_gradients()
            of_batches, norms = self._figures(losses, gradients)
            weights = torch.tensor(targets.of_micro_batches, dtype=torch.float64, device=self.exact_device)
            step_loss = mean_loss((of_batches * weights).sum(), targets.total)
            squares = norms.square().sum()
            dist.all_reduce(squares)
            grad_norm = squares.sqrt() / targets.total
        if loss_limit is not None and step_loss > loss_limit:
            grad_norm = torch.full_like(grad_norm, math.nan)
        with self.times.part(Part.OPTIMIZER):
            if torch.isfinite(grad_norm):
                self._update(gradients, lr, float(self._factor(grad_norm) / targets.total), before_update)
        self._watch_fallback()
        return StepResult(step_loss, targets.total, grad_norm)

    def token_losses(self, batch: TokenBatch) -> torch.Tensor:
        """See Trainer. Rows are filled up to the shape that is compiled."""
        parts = []
        for first in range(0, len(batch.tokens_bt), self._rows):
            some = batch.map(itemgetter(slice(first, first + self._rows)))
            inputs = self._on_device(_filled(some, self._rows))
            with torch.no_grad(), autocast(self.device, self._autocast_bf16):
                nll_bt = self.model(*inputs[:3], token_losses=True, wanted_bt=inputs.wanted_bt).nll_bt
            assert nll_bt is not None
            parts.append(nll_bt.to(self.exact_device)[: len(some.tokens_bt)])
        self._sharding.end_evaluation()
        return torch.cat(parts)

    def replicas(self) -> Mapping[str, torch.Tensor]:
        """See Trainer. Under zero1 the parameters."""
        if self._backend.parallel == "fsdp2":
            return {}
        return {f"{PARAM}/{name}": parameter.detach() for name, parameter in self.model.named_parameters()}

    def _loss(self, inputs: TokenBatch) -> torch.Tensor:
        with autocast(self.device, self._autocast_bf16):
            loss: torch.Tensor | None = self.model(*inputs[:3], wanted_bt=inputs.wanted_bt).loss
        assert loss is not None
        return loss

    def _on_device(self, batch: TokenBatch) -> TokenBatch:
        """A batch of the one shape that there is. Raises: UserError: another one would be compiled for minutes."""
        rows, num_tokens = batch.tokens_bt.shape
        self._num_tokens = self._num_tokens or num_tokens
        if (rows, num_tokens) != (self._rows, self._num_tokens):
            raise UserError(
                f"backend.kind=neuron compiles one graph for each shape: a batch has {rows} rows of {num_tokens} "
                f"tokens, expected {self._rows} of {self._num_tokens}. Give all sequences one seq_len, and all micro "
                "batches one size."
            )
        return batch.map(self._narrowed) if self.device.type == runtime.TYPE else batch

    def _narrowed(self, tensor: torch.Tensor) -> torch.Tensor:
        return copy_to(self.device, tensor.int() if tensor.dtype == torch.int64 else tensor)

    def _figures(
        self, losses: Sequence[torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the micro batches and norms of the gradients, float64 on the host: the one wait in a step."""
        norms = torch._foreach_norm(list(gradients.values())) if gradients else ()
        figures = torch.stack([*(loss.float() for loss in losses), *norms]).to(self.exact_device).double()
        return figures[: len(losses)], figures[len(losses) :]

    def _factor(self, grad_norm: torch.Tensor) -> torch.Tensor | float:
        """What clipping multiplies gradients by."""
        return (self._grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if self._grad_clip else 1.0

    def _update(
        self, gradients: Mapping[str, torch.Tensor], lr: float, factor: float, before_update: BeforeUpdate | None
    ) -> None:
        if gradients:
            torch._foreach_mul_(list(gradients.values()), factor)
        if before_update is not None:
            before_update({name: Piece(self._layout.own[name].start, grad) for name, grad in gradients.items()})
        set_lr(self.optimizer.param_groups, lr)
        with self._with_gradients(gradients):
            self.optimizer.step()
        if self._average is not None:
            self._average.update()
        self._layout.end_load()

    @contextmanager
    def _with_gradients(self, gradients: Mapping[str, torch.Tensor]) -> Iterator[None]:
        for name, gradient in gradients.items():
            self._layout.held[name].updated.grad = gradient
        yield
        for updated in self._layout.updated:
            updated.grad = None

    def _watch_fallback(self) -> None:
        """Look at the first steps for operators that the device left to the host. Raises: UserError."""
        self._num_steps += 1
        if (
            self.device.type != runtime.TYPE
            or self._num_steps > _STEPS_WATCHED
            or self._backend.cpu_fallback == "allow"
        ):
            return
        found = runtime.fallback_ops()
        if not found:
            return
        message = f"these operators ran on the host's CPU instead of the NeuronCore: {', '.join(found)}"
        if self._backend.cpu_fallback == "error":
            raise UserError(
                f"{message}. Each costs copies in every step. Report them, and set train.backend.cpu_fallback: warn to "
                "go on all the same."
            )
        logger.warning("%s.", message)


def _as_it_is(part: Function) -> Function:
    return part


def _filled(batch: TokenBatch, rows: int) -> TokenBatch:
    """With further rows that have no targets, up to so many."""
    missing = rows - len(batch.tokens_bt)
    if not missing:
        return batch
    filled = batch.map(lambda tensor: torch.cat([tensor, tensor[:1].expand(missing, -1)]))
    filled.targets_bt[-missing:] = IGNORED_TARGET
    return filled


def _with_names(groups: list[dict[str, Any]], model: BMojoLM) -> list[dict[str, Any]]:
    """Parameter groups with names in the place of the parameters, which sharding replaces."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[parameter] for parameter in group["params"]]} for group in groups]
