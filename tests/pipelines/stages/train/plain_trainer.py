"""The smallest Trainer there can be: plain torch, one process. It shows that the protocol is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bmojo import BMojoLM
from bmojo.model import projection_names
from data.shards import TokenBatch, TokenSplit, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.train.backends.zero import Place
from pipelines.stages.train.checkpoint import Checkpoint, step_dir
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.loop import TrainLoop
from pipelines.stages.train.optimizers.average import WeightAverage
from pipelines.stages.train.optimizers.build import build_optimizer, new_state, state_names
from pipelines.stages.train.optimizers.groups import set_lr
from pipelines.stages.train.optimizers.muon import Muon
from pipelines.stages.train.pieces import Piece, Read, even_shares
from pipelines.stages.train.telemetry.times import Part, StepTimes
from pipelines.stages.train.trainer import PARAM, BeforeUpdate, StepResult, count_targets, mean_loss, named_shapes
from pipelines.stages.train.weights import build_model


class PlainTrainer:
    """A model and torch's AdamW on the CPU."""

    device = exact_device = CPU
    versions: Mapping[str, str] = {"torch": torch.__version__}

    def __init__(self, model: BMojoLM, config: TrainStageConfig) -> None:
        self.model, self._grad_clip = model, config.grad_clip
        self.times = StepTimes(CPU)
        self._params = dict(model.named_parameters())
        self._optimizer = build_optimizer(model, config)
        names, shapes = state_names(model, config), {name: param.shape for name, param in self._params.items()}
        self.shapes = named_shapes(shapes, names)
        for name, param in self._params.items():
            self._optimizer.state[param] = new_state(param, names[name])
        if isinstance(self._optimizer, Muon):
            places = {name: Place(0, param.numel(), param, 0) for name, param in self._params.items()}
            matrices = {name: shapes[name] for name in projection_names(model)}
            self._optimizer.attach(matrices, places, list(self._params.values()))
        self._average: WeightAverage | None = None
        if config.ema_decay is not None:
            self._average = WeightAverage(config.ema_decay, list(self._params.values()), self._optimizer.state)

    def step(
        self,
        micro_batches: Sequence[TokenBatch],
        lr: float,
        loss_limit: torch.Tensor | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> StepResult:
        targets = count_targets(micro_batches, CPU)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for batch, num_targets in zip(micro_batches, targets.of_micro_batches, strict=True):
            with self.times.part(Part.FORWARD):
                loss = self.model(*batch[:3], wanted_bt=batch.wanted_bt).loss
            (loss * (num_targets / targets.total.double()).to(loss.dtype)).backward()
            loss_sum += loss.detach().double() * num_targets
        loss = mean_loss(loss_sum, targets.total)
        norm = torch.nn.utils.clip_grad_norm_(self._params.values(), self._grad_clip or float("inf"))
        if loss_limit is not None and loss > loss_limit:
            norm = torch.tensor(float("nan"))
        if before_update is not None:
            gradients = {name: param.grad for name, param in self._params.items()}
            before_update({name: Piece(0, grad.view(-1)) for name, grad in gradients.items() if grad is not None})
        if torch.isfinite(norm):
            set_lr(self._optimizer.param_groups, lr)
            self._optimizer.step()
            if self._average is not None:
                self._average.update()
        self._optimizer.zero_grad()
        return StepResult(loss, targets.total, norm)

    @torch.no_grad()
    def token_losses(self, batch: TokenBatch) -> torch.Tensor:
        nll_bt: torch.Tensor = self.model(*batch[:3], token_losses=True, wanted_bt=batch.wanted_bt).nll_bt
        return nll_bt

    def tensor(self, key: str) -> torch.Tensor:
        prefix, name = key.split("/", 1)
        param = self._params[name]
        found: torch.Tensor = param.detach() if prefix == PARAM else self._optimizer.state[param][prefix]
        return found

    def pieces(self) -> Mapping[str, Piece]:
        shares = even_shares({key: shape.numel() for key, shape in self.shapes.items()}, 0, 1)
        return {key: Piece(start, self.tensor(key).view(-1)[start:][:numel]) for key, (start, numel) in shares.items()}

    def replicas(self) -> Mapping[str, torch.Tensor]:
        return {key: self.tensor(key) for key in self.shapes}

    def load(self, read: Read, num_steps: int) -> None:
        for key, shape in self.shapes.items():
            self.tensor(key).copy_(read(key, 0, shape.numel()).view(shape))
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(num_steps)
        if self._average is not None:
            self._average.load(num_steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self._average is not None
        self._average.swap()
        yield
        self._average.swap()


def train_plainly(job: TrainJob, trainer: type[PlainTrainer] = PlainTrainer) -> TrainFacts:
    """Do what a worker does, without Ray and DeepSpeed, in a process group of one."""
    config = job.config
    sizes = {"micro_batch_size": config.worker_micro_batch_size, "global_batch_size": config.global_batch_size}
    resumed = Checkpoint(job.artifact.local / step_dir(job.resume_step)) if job.resume_step is not None else None
    folders = {source.name: source.artifact.local for source in job.sources}
    valid = {
        name: list(read_token_batches(TokenSplit(folder, "valid"), config.micro_batch_size, max_samples=16))
        for name, folder in folders.items()
    }
    with TokenStream(
        [TokenSplit(folder, "train") for folder in folders.values()],
        **sizes,
        order=StreamOrder(seed=config.seed),
        worker=Worker(),
        batches=job.batches,
        mixture=job.mixture,
    ) as stream:
        loop = TrainLoop(job, trainer(build_model(job), config), stream, valid, resumed)
        with loop.saver:
            facts = loop.run()
    assert facts is not None
    return facts
