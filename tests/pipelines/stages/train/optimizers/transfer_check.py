"""Small trainings at several widths and depths: how far activations move, and which learning rate is best."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch

from bmojo import BMojoLM, ModelConfig
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.build import build_optimizer
from pipelines.stages.train.optimizers.groups import set_lr
from pipelines.stages.train.optimizers.transfer import scale_initial_values

BASE_WIDTH, HEAD_DIM, VOCAB_SIZE = 32, 16, 64


class Moved(NamedTuple):
    """Root mean square of what training changed."""

    hidden: float  # the residual stream before the last norm
    logits: float


def settings(d_model: int, num_layers: int, transfers: bool, **changes: Any) -> TrainStageConfig:
    """A model of that size, whose heads have one size."""
    heads = d_model // HEAD_DIM
    model = {
        "pattern": f"(bmojo,mamba2)*{num_layers // 2}", "vocab_size": VOCAB_SIZE, "d_model": d_model,
        "num_heads": heads, "d_ff": 2 * d_model, "window_size": 32, "chunk_size": 16, "num_eidetic": 8, "d_state": 16,
        "ssm_head_dim": HEAD_DIM, "fading_output": "memory_and_residual",
    }  # fmt: skip
    transfer = {"base_d_model": BASE_WIDTH, "base_num_layers": 2} if transfers else None
    fields = {"kind": "train", "model": model, "global_batch_size": 8, "micro_batch_size": 8, "max_steps": 100}
    return TrainStageConfig.model_validate(fields | {"warmup_steps": 0, "transfer": transfer} | changes)


def initial(config: TrainStageConfig, seed: int) -> BMojoLM:
    model = BMojoLM(ModelConfig.model_validate(config.model.model_dump()))
    model.init_weights(seed)
    scale_initial_values(model, config.transfer)
    return model


def sequences(number: int, num_rows: int = 8, num_tokens: int = 64) -> torch.Tensor:
    """Texts of a small Markov chain, which is the same for all numbers."""
    chain = torch.Generator().manual_seed(0)
    likely = torch.randint(VOCAB_SIZE, (VOCAB_SIZE, 4), generator=chain)
    own = torch.Generator().manual_seed(1000 + number)
    tokens = [torch.randint(VOCAB_SIZE, (num_rows,), generator=own)]
    for _ in range(num_tokens):
        choice = torch.randint(4, (num_rows,), generator=own)
        tokens.append(likely[tokens[-1], choice])
    return torch.stack(tokens, 1)


def train(config: TrainStageConfig, lr: float, num_steps: int, seed: int = 0) -> tuple[BMojoLM, list[float]]:
    """The model after so many steps, and the loss of each."""
    model = initial(config, seed)
    optimizer = build_optimizer(model, config)
    losses = []
    for step in range(num_steps):
        tokens = sequences(step)
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        set_lr(optimizer.param_groups, lr * (1 - step / num_steps))
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


def moved(d_model: int, num_layers: int, transfers: bool, lr: float = 3e-3, num_steps: int = 4) -> Moved:
    """How far some steps move activations, the median over seeds."""
    config = settings(d_model, num_layers, transfers)
    found = []
    for seed in range(3):
        before, after = (train(config, lr, steps, seed)[0] for steps in (0, num_steps))
        tokens = sequences(999)
        with torch.no_grad():
            here, there = (model(tokens, return_hidden=True) for model in (after, before))
        hidden = [out.hidden_btd[-2] for out in (here, there)]
        change = [(a - b).pow(2).mean().sqrt().item() for a, b in (hidden, (here.logits_btv, there.logits_btv))]
        found.append(Moved(*change))
    return Moved(*(statistics.median(values) for values in zip(*found, strict=True)))


def last_loss(d_model: int, transfers: bool, lr: float, num_steps: int, num_layers: int = 2) -> float:
    """Mean loss of the last tenth of a training; infinite if it diverged."""
    losses = train(settings(d_model, num_layers, transfers), lr, num_steps)[1]
    mean = statistics.fmean(losses[-max(num_steps // 10, 1) :])
    return mean if mean == mean else float("inf")
