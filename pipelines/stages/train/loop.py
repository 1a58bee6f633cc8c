"""The training loop that every worker runs: steps, points of the curves, validation, checkpoints, the final model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from data.shards import TokenBatch
from data.streaming import TokenStream
from pipelines.errors import LostError
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import device
from pipelines.stages.train.agreement import Agreement, LeftToGrow, Wish
from pipelines.stages.train.curves import Curves
from pipelines.stages.train.data import final_weights
from pipelines.stages.train.divergence import diverged, first_ruined_tensor, is_ruined
from pipelines.stages.train.guards.documents import DocumentCanary
from pipelines.stages.train.guards.incidents import Incidents
from pipelines.stages.train.guards.pulse import beat
from pipelines.stages.train.guards.replicas import refuse_differing_replicas
from pipelines.stages.train.guards.rewind import Fetch, go_back
from pipelines.stages.train.guards.steps import StepLedger
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.paths import OperatorPaths
from pipelines.stages.train.resuming import verify_and_report
from pipelines.stages.train.saving import Saver
from pipelines.stages.train.sources import mean_by_weight, source_losses
from pipelines.stages.train.start import load_start
from pipelines.stages.train.telemetry.telemetry import Telemetry
from pipelines.stages.train.telemetry.times import Part
from pipelines.stages.train.trainer import Trainer
from pipelines.stages.train.validation import validation_loss
from pipelines.stages.train.weights import save_model
from pipelines.storage.artifact import ArtifactDir


class TrainLoop:
    """One worker's side of a training run. Every method is a collective: all ranks call them in the same order."""

    def __init__(
        self,
        job: TrainJob,
        trainer: Trainer,
        stream: TokenStream,
        validation_batches: Mapping[str, Sequence[TokenBatch]],
        resumed: checkpoints.Checkpoint | None,
        is_preempted: Callable[[], bool] | None = None,
        fetch: Fetch = ArtifactDir.fetch,
    ) -> None:
        """`validation_batches`: by source. `is_preempted`: a collective that tells whether a worker's machine will be
        taken away soon. `fetch`: how checkpoints come to this machine."""
        self.job, self.config, self.trainer, self.stream = job, job.config, trainer, stream
        self.validation_batches, self.fetch = validation_batches, fetch
        self.rank, self.num_workers = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._steps_before = 0  # of the optimizer, in the stage that this one started from
        self.initial_valid_loss: float | None = None
        self._agreement = Agreement(job.metrics.request, self._is_save_due, is_preempted, trainer.exact_device)
        self._saved_at = time.monotonic()  # or when training began here
        journal = job.metrics if self.rank == 0 else None
        self.curves, self.paths = Curves(journal), OperatorPaths(journal)
        kept = checkpoints.Kept(self.config.keep_checkpoints, self.config.keep_every_steps)
        self.saver = Saver(job.artifact, kept, trainer.device, self.curves.flush)
        self.incidents = Incidents(job.artifact, job.sources, stream)
        self.ledger = StepLedger(
            job.config, trainer.exact_device, job.num_steps, self.curves, self.incidents, self._diverged
        )
        self.canary = DocumentCanary(trainer, job.config, self.incidents)
        self.telemetry = Telemetry(job, trainer)
        self.meter = self.telemetry.meter
        if job.start is not None and job.start.data is not None:
            stream.require_same_order(job.start.data)
        if resumed is not None:
            self._restore(resumed)
        elif job.start is not None and job.start.step is not None:
            self._steps_before = load_start(trainer, job.start)

    def run(self) -> TrainFacts | None:
        """Train to the last step and write the model. Returns the facts on rank 0, None on the others."""
        if self.step == 0:
            self.curves.add(0, {"train/max_steps": self.job.num_steps})
            self.initial_valid_loss = self._validate()
        self._batches = iter(self.stream)
        final_valid_loss: float | None = None
        if self.step == self.job.num_steps:  # the last checkpoint is there, the model is not
            final_valid_loss = self._validate()
        first_step = self.step + 1
        while self.step < self.job.num_steps:
            self.saver.check()
            self._train_step()
            if self.step == first_step:  # by now the optimizer has its state
                self.saver.prepare(self.trainer.pieces())
            if self._went_back():
                continue
            self.paths.report()
            last = self.step == self.job.num_steps
            save = last or self._is_due(self.config.checkpoint_every_steps)
            if save:
                self._refuse_ruined_weights()
            elif self._is_due(self.config.check_replicas_every_steps):
                self._compare_replicas()
            if last or self._is_due(self.config.validate_every_steps):  # first: what it refuses is never saved
                final_valid_loss = self._validate()
            if save:
                self._save_checkpoint()
            if not last:
                self._obey(self._agreement.reached(), saved=save)
        averaged_valid_loss = self._save_model()
        self.saver.wait()
        self.curves.flush()
        return self._facts(final_valid_loss, averaged_valid_loss) if self.rank == 0 else None

    def _save_model(self) -> float | None:
        """Write the model: the averages of the weights if they are kept. Returns their validation loss."""
        if self.config.ema_decay is None:
            save_model(self.job, self.trainer)
            return None
        with self.trainer.averaged():
            loss = mean_by_weight(self._valid_losses(), final_weights(self.config))
            save_model(self.job, self.trainer)
        if loss is not None and self.curves.last_step("valid/loss_ema") < self.step:
            self.curves.add(self.step, {"valid/loss_ema": loss})
        return loss

    def _obey(self, wish: Wish, saved: bool) -> None:
        """Save, if that is not done yet, and end if that is wished."""
        if wish is Wish.NONE:
            return
        if not saved:
            self._check_steps()
            if not self._went_back():
                self._refuse_ruined_weights()
                self._save_checkpoint()
        if wish is not Wish.SAVE:
            self.saver.wait()
            end = LeftToGrow if wish is Wish.GROW else LostError
            raise end(f"Training stopped after step {self.step}, with a checkpoint: {wish.reason}.")

    def _is_save_due(self) -> bool:
        """Whether the last checkpoint is too long ago, by this worker's clock."""
        every_s = self.config.checkpoint_every_s
        return every_s is not None and time.monotonic() - self._saved_at >= every_s

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    def _train_step(self) -> None:
        next_step = self.step + 1
        log = next_step in (1, self.job.num_steps) or next_step % self.config.log_every_steps == 0
        lr = self.config.learning_rate(next_step, self.job.num_steps)
        self.telemetry.begin_step(next_step, is_logged=log)
        beat("reads its batches", next_step)
        num_micro_batches = self.job.batches.size(self.step) // (self.num_workers * self.config.worker_micro_batch_size)
        with self.trainer.times.host(Part.DATA):
            micro_batches = [next(self._batches) for _ in range(num_micro_batches)]
        self.canary.check(next_step, micro_batches, is_look=log)
        by_source = self._losses_by_source(micro_batches) if log else {}
        if not self.ledger.leaves_out(next_step):
            norms = self.telemetry.norms.watch(next_step, is_logged=log)
            self.ledger.add(next_step, self.trainer.step(micro_batches, lr, self.ledger.loss_limit(), norms))
        self.step = next_step
        self.telemetry.end_step(next_step)
        is_due = any(map(self._is_due, (self.config.checkpoint_every_steps, self.config.validate_every_steps)))
        if log or is_due or self.ledger.is_check_due:
            self._check_steps()
        if log and self.ledger.spike is None:
            self._log(lr, by_source)

    def _check_steps(self) -> None:
        """Learn from the device on how much the last steps were taken, and whether they were applied."""
        self.meter.count(self.ledger.check())

    def _went_back(self) -> bool:
        """Go back to a checkpoint, if a spike asks for it and there is one."""
        while (spike := self.ledger.spike) is not None:
            assert self.config.spikes is not None
            self.saver.wait()
            wished = spike.step - self.config.spikes.rewind_before - 1
            found = go_back(self.job.artifact, spike.step - 1, wished, self.fetch, self.trainer.exact_device)
            if found is not None:
                self.ledger.plan_rewind(spike, found.state.step)
                self.stream.stop()
                self._restore(found)
                self._batches = iter(self.stream)
                return True
            self.ledger.give_up_rewind()
            self._check_steps()
        return False

    def _losses_by_source(self, micro_batches: Sequence[TokenBatch]) -> dict[str, float]:
        """Points of the curves of a mixture's sources, before the update."""
        names = [source.name for source in self.job.sources]
        if len(names) == 1:
            return {}
        losses = source_losses(self.trainer, self.stream, self.step, micro_batches, names)
        return {f"train/loss/{name}": loss for name, loss in losses.items()}

    def _log(self, lr: float, by_source: Mapping[str, float]) -> None:
        applied = self.ledger.applied(self.step)
        self.curves.add(
            self.step,
            {
                "train/loss": applied.loss if applied else None,
                "train/lr": lr,
                "train/grad_norm": applied.grad_norm if applied else None,
                "train/tokens": self.ledger.num_tokens,
                "train/num_workers": self.num_workers,
                **self.telemetry.points(self.step, applied.grad_norm if applied else None),
                **by_source,
            },
        )

    def _valid_losses(self) -> dict[str, float]:
        return {name: validation_loss(self.trainer, batches) for name, batches in self.validation_batches.items()}

    def _validate(self) -> float | None:
        self._check_steps()
        self.meter.stop()
        losses = self._valid_losses()
        loss = mean_by_weight(losses, final_weights(self.config))
        if loss is None:
            return None
        if self.curves.last_step("valid/loss") < self.step:
            by_source = {f"valid/loss/{name}": each for name, each in losses.items()} if len(losses) > 1 else {}
            self.curves.add(self.step, {"valid/loss": loss, **by_source})
        if self.step and is_ruined(loss, self.job.model.vocab_size):
            raise self._diverged(f"the validation loss is {loss:.6g} after step {self.step} of {self.job.num_steps}")
        return loss

    def _compare_replicas(self) -> None:
        refuse_differing_replicas(self.trainer, self.incidents, self.step, self.saver.saved_step)

    def _refuse_ruined_weights(self) -> None:
        """What is saved afterwards is finite, and of replicas that are alike."""
        self._compare_replicas()
        key = first_ruined_tensor(self.trainer)
        if key is not None:
            raise self._diverged(f"{key} is not finite after step {self.step} of {self.job.num_steps}")

    def _diverged(self, what: str) -> Exception:
        self.saver.wait()
        return diverged(self.job, self.saver.saved_step, what)

    def _save_checkpoint(self) -> None:
        beat("saves a checkpoint")
        self.meter.stop()
        position = self.job.batches.start(self.step)
        state = checkpoints.TrainingState(
            step=self.step,
            num_tokens=self.ledger.num_tokens,
            num_samples=self.config.num_samples(self.step),
            optimizer_steps=self._steps_before + self.step - len(self.ledger.skipped),
            skipped_steps=self.ledger.skipped,
            left_out=sorted(self.ledger.left_out),
            recent_losses=list(self.ledger.recent_losses),
            num_workers=self.num_workers,
            data=self.stream.state_dict(position),
            train_loss=self.ledger.train_loss,
            initial_valid_loss=self.initial_valid_loss,
            train_time_s=self.meter.total_time_s,
            history=self.curves.history,
            versions=dict(self.trainer.versions),
            backend=self.config.backend.model_dump(mode="json"),
        )
        with self.trainer.times.host(Part.CHECKPOINT):
            self.saver.save(state, self.trainer.pieces(), device.rng_state(self.trainer.device))
        self._saved_at = time.monotonic()

    def _restore(self, resumed: checkpoints.Checkpoint) -> None:
        state = resumed.state
        self.trainer.load(resumed.read, state.optimizer_steps)
        verify_and_report(self.job, resumed, self.trainer)
        self.stream.load_state_dict(state.data)
        self.step, self.initial_valid_loss = state.step, state.initial_valid_loss
        self._steps_before = state.optimizer_steps - (state.step - len(state.skipped_steps))
        self.ledger.restore(state)
        self.meter.total_time_s = state.train_time_s
        self.saver.saved_step = state.step
        self.curves.restore(state.history, state.step)
        if state.num_workers == self.num_workers:
            device.set_rng_state(resumed.rng(self.rank), self.trainer.device)

    def _facts(self, final_valid_loss: float | None, averaged_valid_loss: float | None) -> TrainFacts:
        return TrainFacts(
            steps=self.step,
            tokens_seen=self.ledger.num_tokens,
            skipped_steps=tuple(self.ledger.skipped),
            final_train_loss=self.ledger.train_loss,
            initial_valid_loss=self.initial_valid_loss,
            final_valid_loss=final_valid_loss,
            averaged_valid_loss=averaged_valid_loss,
            num_params=self.telemetry.counts.num_params,
            train_time_s=self.meter.total_time_s,
            **self.telemetry.facts(self.ledger.num_tokens),
            devices=f"{self.num_workers} x {device.name_of(self.trainer.device)}",
            history=self.curves.history,
        )
