"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pipelines.stages.train.config import TrainStageConfig, WsdSchedule


def learning_rate(config: TrainStageConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `num_steps`.

    Rises linearly over warmup_steps (step warmup_steps has the full lr), then follows config.schedule, and is
    lr * min_lr_ratio at the last step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if isinstance(config.schedule, WsdSchedule):
        decay_steps = min(math.ceil(config.schedule.decay_fraction * num_steps), num_steps - config.warmup_steps)
        progress = max(0.0, (step - (num_steps - decay_steps)) / decay_steps)
        return config.lr * (1 - (1 - config.min_lr_ratio) * progress)
    progress = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
