"""Models for benchmarks.store: trained on associative recall, and kept, so that the measurement resumes from them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recall import Settings as RecallSettings
from benchmarks.recall import _lr_factor, as_tensors, evaluate
from bmojo import BMojoLM, ModelConfig
from bmojo.checkpoint_io import load_pretrained, save_pretrained
from data.tasks.recall_batches import recall_batch, recall_batches

MODELS: dict[str, dict[str, Any]] = {
    "bmojo": {"pattern": "bmojo*2"},
    "hybrid": {"pattern": "mamba2,bmojo", "attention_conv_width": 4},
}
TEST_SEED = 1_000_003
CHECK_EVERY_STEPS = 100


TASK = RecallSettings(seq_len=96, vocab_size=256, min_distance=24, steps=1500)
"""That of benchmarks.recall with more keys. Queries come beyond both memories that slide (2 W)."""


@dataclass(frozen=True)
class Training:
    """One model's training."""

    pattern: str
    seed: int = 0
    recall: RecallSettings = TASK

    def model(self) -> ModelConfig:
        """The architecture."""
        return self.recall.model("bmojo").replace(**MODELS[self.pattern])


def trained(training: Training, folder: Path) -> BMojoLM:
    """The model, trained now unless it is in the folder."""
    at = folder / f"{training.pattern}-{training.seed}"
    if not (at / "digests.json").is_file():
        save_pretrained(_train(training), at)
    return load_pretrained(at).eval()


def _train(training: Training) -> BMojoLM:
    settings = training.recall
    model = BMojoLM(training.model())
    model.init_weights(training.seed)
    optimizer = torch.optim.AdamW(model.param_groups(settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, settings))
    test = as_tensors(recall_batch(settings.task, settings.num_test, TEST_SEED))
    started = time.process_time()
    for step, drawn in zip(
        range(settings.steps), recall_batches(settings.task, settings.batch_size, training.seed), strict=False
    ):
        batch = as_tensors(drawn)
        loss = model(batch.tokens_bt, batch.targets_bt).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECK_EVERY_STEPS == 0:
            accuracy = evaluate(model, test, settings.num_pairs)["accuracy"]
            print(
                f"{training.pattern} seed {training.seed} step {step + 1}: accuracy {accuracy:.3f} "
                f"({time.process_time() - started:.0f} s)",
                flush=True,
            )
    return model
