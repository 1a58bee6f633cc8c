"""The optimizer of a training, and the tensors that it keeps of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bmojo import BMojoLM
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.average import EMA
from pipelines.stages.train.optimizers.config import MuonConfig
from pipelines.stages.train.optimizers.groups import muon_names, parameter_groups
from pipelines.stages.train.optimizers.muon import MOMENTUM, Muon

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: BMojoLM, config: TrainStageConfig) -> torch.optim.AdamW | Muon:
    """The optimizer of the settings. Its rate is 0 until a step sets it, so that nothing before can move a weight."""
    return optimizer_of(parameter_groups(model, config), config)


def optimizer_of(groups: list[dict[str, Any]], config: TrainStageConfig) -> torch.optim.AdamW | Muon:
    """The same, of groups whose `params` may be parts of the parameters."""
    if isinstance(config.optimizer, MuonConfig):
        compute_dtype = torch.bfloat16 if config.autocast_bf16 else torch.float32
        return Muon(groups, config.optimizer, config.betas, config.eps, compute_dtype)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def state_names(model: BMojoLM, config: TrainStageConfig) -> dict[str, tuple[str, ...]]:
    """By parameter: the tensors of its size that are kept beside it, by the names that checkpoints have them under."""
    by_muon = muon_names(model, config)
    average = () if config.ema_decay is None else (EMA,)
    return {
        name: (*((MOMENTUM,) if name in by_muon else ADAMW_MOMENTS), *average) for name, _ in model.named_parameters()
    }


def new_state(updated: torch.Tensor, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """State before the first step, so that a checkpoint can be put into it: optimizers make theirs at that step.

    Args: updated: a parameter, or what ZeRO updates in its place. names: as state_names gives them.
    """
    state = {name: torch.zeros_like(updated, requires_grad=False) for name in names}
    if EMA in state:
        state[EMA].copy_(updated.detach())
    if ADAMW_MOMENTS[0] in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=updated.device)
    return state
