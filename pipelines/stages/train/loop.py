"""The training loop that every worker runs: steps, points of the curves, validation, checkpoints, the final model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist

from bmojo import BMojoLM
from bmojo.checkpoint_io import save_pretrained
from bmojo.counting import count
from pipelines.errors import UserError
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import rng
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.schedule import learning_rate
from pipelines.stages.train.throughput import Meter, peak_flops
from pipelines.stages.train.validation import validation_loss
from pipelines.stages.train.zero import MOMENTS, ZeroTrainer

if TYPE_CHECKING:
    from data.shards import TokenBatch
    from data.streaming import TokenStream

MODEL = "model"


_RUINED = 2.0  # times the loss of guessing among all ids alike


def is_ruined(loss: float, vocab_size: int | None) -> bool:
    """Whether a validation loss, in nats per token, is that of no model: not finite, or far worse than guessing."""
    assert vocab_size is not None
    return not loss <= _RUINED * math.log(vocab_size)


class TrainLoop:
    """One worker's side of a training run. Every method is a collective: all ranks call them in the same order."""

    def __init__(
        self,
        job: TrainJob,
        trainer: ZeroTrainer,
        stream: TokenStream,
        validation_batches: Sequence[TokenBatch],
        resumed: checkpoints.Checkpoint | None,
    ) -> None:
        self.job = job
        self.config = job.config
        self.trainer = trainer
        self.stream = stream
        self.validation_batches = validation_batches
        self.rank, self.num_workers = dist.get_rank(), dist.get_world_size()
        self.device = trainer.device
        self.counts = count(job.model, job.seq_len)
        self.step = 0
        self.num_tokens = 0
        self.initial_valid_loss: float | None = None
        self.train_loss = math.nan
        self.saved_step: int | None = None
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.meter = Meter(
            flops_per_token=self.counts.train_flops_per_token,
            peak_flops=peak_flops(self.device, self.config.autocast_bf16),
            device=self.device,
        )
        if resumed is not None:
            self._restore(resumed)

    def run(self) -> TrainFacts | None:
        """Train to the last step and write the model. Returns the facts on rank 0, None on the others."""
        if self.step == 0:
            self._log(0, {"train/max_steps": self.job.num_steps})
            self.initial_valid_loss = self._validate()
        batches = iter(self.stream)
        final_valid_loss: float | None = None
        if self.step == self.job.num_steps:  # the last checkpoint is there, the model is not
            final_valid_loss = self._validate()
        while self.step < self.job.num_steps:
            self._train_step(batches)
            last = self.step == self.job.num_steps
            save = last or self._due(self.config.checkpoint_every_steps)
            if save:
                self._check_weights()
            if last or self._due(self.config.validate_every_steps):  # first: what it refuses is never saved
                final_valid_loss = self._validate()
            if save:
                self._save_checkpoint()
        self._save_model()
        if self.rank == 0:
            self.job.metrics.flush()
        return self._facts(final_valid_loss) if self.rank == 0 else None

    def _due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    def _train_step(self, batches: Iterator[TokenBatch]) -> None:
        self.meter.start_step()
        step = self.step + 1
        lr = learning_rate(self.config, step, self.job.num_steps)
        micro_batches = [next(batches) for _ in range(self.config.accumulation_steps)]
        num_targets = [int((batch.targets_bt >= 0).sum()) for batch in micro_batches]
        total = torch.tensor(sum(num_targets), dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        step_targets = int(total)
        # DeepSpeed averages over workers and micro batches; with these weights every token of the global batch
        # counts the same.
        scale = self.num_workers * len(micro_batches) / step_targets
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        grad_norm: float | None = None
        for batch, targets in zip(micro_batches, num_targets, strict=True):
            loss = self.trainer.backward(
                batch.tokens_bt.to(self.device, non_blocking=True),
                batch.targets_bt.to(self.device, non_blocking=True),
                batch.doc_ids_bt.to(self.device, non_blocking=True),
                weight=targets * scale,
            )
            loss_sum += loss.double() * targets
            grad_norm = self.trainer.finish_micro_batch(lr)
        assert grad_norm is not None, "the last micro batch of a step must update the weights"
        self.meter.end_step(step_targets)
        if not math.isfinite(grad_norm):
            raise self._diverged(
                f"loss or gradients are not finite at step {step} of {self.job.num_steps}, which was not applied"
            )
        self.step = step
        self.num_tokens += step_targets
        self._after_step(loss_sum, step_targets, lr, grad_norm)

    def _after_step(self, loss_sum: torch.Tensor, step_targets: int, lr: float, grad_norm: float) -> None:
        last = self.step == self.job.num_steps
        log = last or self.step == 1 or self._due(self.config.log_every_steps)
        if not (log or self._due(self.config.checkpoint_every_steps)):
            return
        dist.all_reduce(loss_sum)
        self.train_loss = float(loss_sum) / step_targets
        if not math.isfinite(self.train_loss):
            raise self._diverged(f"the loss is {self.train_loss} at step {self.step} of {self.job.num_steps}")
        if log:
            tokens_per_s, mfu = self.meter.take()
            self._log(
                self.step,
                {
                    "train/loss": self.train_loss,
                    "train/lr": lr,
                    "train/grad_norm": grad_norm,
                    "train/tokens": self.num_tokens,
                    "train/tokens_per_s": tokens_per_s,
                    "train/mfu": mfu,
                },
            )

    def _validate(self) -> float | None:
        if not self.validation_batches:
            return None
        loss = validation_loss(
            self.trainer.token_losses, self.validation_batches, self.rank, self.num_workers, self.device
        )
        if self.history.get("valid/loss", [(-1, 0.0)])[-1][0] < self.step:
            self._log(self.step, {"valid/loss": loss})
        if self.step and is_ruined(loss, self.job.model.vocab_size):
            raise self._diverged(f"the validation loss is {loss:.6g} after step {self.step} of {self.job.num_steps}")
        return loss

    def _check_weights(self) -> None:
        """Refuse weights that are not finite. A collective; every rank sees the same."""
        for name in self.trainer.shapes:
            if not bool(torch.isfinite(self.trainer.whole_parameter(name)).all()):
                raise self._diverged(f"{name} is not finite after step {self.step} of {self.job.num_steps}")

    def _log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, value))
        if self.rank == 0:
            self.job.metrics.log_metrics(step, values)

    def _save_checkpoint(self) -> None:
        artifact, trainer = self.job.artifact, self.trainer
        if self.rank == 0:
            checkpoints.clear(artifact, self.step)
        dist.barrier()
        tensors = {}
        keys = [(prefix, name) for name in trainer.shapes for prefix in ("param", *MOMENTS)]
        owners = checkpoints.assign_owners([trainer.shapes[name].numel() for _, name in keys], self.num_workers)
        for (prefix, name), owner in zip(keys, owners, strict=True):
            whole = trainer.whole_parameter(name) if prefix == "param" else trainer.whole_moment(name, prefix)
            if owner == self.rank:
                tensors[f"{prefix}/{name}"] = whole.detach().to("cpu", copy=True).contiguous()
        entries = checkpoints.write_rank_files(
            artifact, self.step, self.rank, self.num_workers, tensors, rng.capture(self.device)
        )
        all_entries: list[dict[str, checkpoints.FileEntry]] = [{} for _ in range(self.num_workers)]
        dist.all_gather_object(all_entries, entries)
        if self.rank == 0:
            self.job.metrics.flush()
            checkpoints.complete(artifact, self._state(), {k: v for each in all_entries for k, v in each.items()})
            checkpoints.prune(artifact, self.step, self.config.keep_checkpoints)
        dist.barrier()
        self.saved_step = self.step

    def _state(self) -> checkpoints.TrainingState:
        num_samples = self.step * self.config.global_batch_size
        return checkpoints.TrainingState(
            step=self.step,
            num_tokens=self.num_tokens,
            num_samples=num_samples,
            optimizer_steps=self.trainer.optimizer_steps,
            num_workers=self.num_workers,
            data=self.stream.state_dict(num_samples),
            train_loss=self.train_loss,
            initial_valid_loss=self.initial_valid_loss,
            train_time_s=self.meter.total_time_s,
            history=self.history,
            versions={"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        )

    def _restore(self, resumed: checkpoints.Checkpoint) -> None:
        """Everything but the parameters, which the model already had when DeepSpeed took it over."""
        state = resumed.state
        for moment in MOMENTS:
            for name, value in resumed.tensors(moment):
                self.trainer.set_moment(name, moment, value)
        self.trainer.set_optimizer_steps(state.optimizer_steps)
        self.stream.load_state_dict(state.data)
        self.step, self.num_tokens = state.step, state.num_tokens
        self.train_loss, self.initial_valid_loss = state.train_loss, state.initial_valid_loss
        self.meter.total_time_s = state.train_time_s
        self.saved_step = state.step
        for name, points in state.history.items():
            for step, point in points:  # what this run's journal already has, it skips
                self._log(step, {name: point})
        if self.rank == 0:
            self.job.metrics.log_metrics(self.step, {"train/resumed_from_step": self.step})
        if state.num_workers == self.num_workers:
            rng.restore(resumed.rng(self.rank), self.device)

    def _save_model(self) -> None:
        weights = {name: self.trainer.whole_parameter(name) for name in self.trainer.shapes}
        if self.rank == 0:
            model = BMojoLM(self.job.model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
            save_pretrained(model, self.job.artifact.local / MODEL)
            self.job.artifact.publish(MODEL)
        dist.barrier()

    def _facts(self, final_valid_loss: float | None) -> TrainFacts:
        tokens_per_s = self.num_tokens / self.meter.total_time_s
        return TrainFacts(
            steps=self.step,
            tokens_seen=self.num_tokens,
            final_train_loss=self.train_loss,
            initial_valid_loss=self.initial_valid_loss,
            final_valid_loss=final_valid_loss,
            num_params=self.counts.num_params,
            train_time_s=self.meter.total_time_s,
            tokens_per_s=tokens_per_s,
            mfu=self.meter.mfu(tokens_per_s),
            history=self.history,
        )

    def _diverged(self, what: str) -> UserError:
        if self.saved_step is None:
            last_good = "There is no checkpoint before it"
        else:
            last_good = f"The last good checkpoint is {self.job.artifact.url}/{checkpoints.step_dir(self.saved_step)}"
        return UserError(
            f"Training diverged: {what}. {last_good}. Try a lower lr (now {self.config.lr:g}), more warmup_steps (now "
            f"{self.config.warmup_steps}), a smaller grad_clip (now {self.config.grad_clip:g}), or precision: fp32."
        )
