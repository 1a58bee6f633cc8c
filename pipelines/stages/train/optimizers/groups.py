"""Which parameters are updated alike: by the model's own rule of decay, and by the groups of the settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from base.errors import UserError
from bmojo import BMojoLM, ModelConfig
from bmojo.model import projection_names
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.config import GroupConfig, MuonConfig
from pipelines.stages.train.optimizers.transfer import factors_of


def parameter_groups(model: BMojoLM, config: TrainStageConfig) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: `params` in the model's order, their settings, `lr_ratio` and `uses_muon`.

    Raises: UserError: a group of the settings matches no parameter.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    problem = idle_group(config.groups, names.values())
    if problem is not None:
        raise UserError(f"train.groups: {problem}")
    by_muon = muon_names(model, config)
    factors = factors_of(model, config.transfer)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, own in enumerate(model.param_groups(config.weight_decay)):
        for parameter in own["params"]:
            name = names[parameter]
            rule, scaled = _rule_of(name, config.groups), factors[name]
            key = (rule, number, name in by_muon, scaled[1:])
            if key not in found:
                group = config.groups[rule] if rule >= 0 else GroupConfig(match="*")
                decay = own["weight_decay"] if group.weight_decay is None else group.weight_decay
                found[key] = {
                    "params": [],
                    "weight_decay": decay * scaled.weight_decay,
                    "lr_ratio": group.lr_ratio * scaled.lr,
                    "eps": config.eps * scaled.eps,
                    "uses_muon": name in by_muon,
                }
            found[key]["params"].append(parameter)
    return [found[key] for key in sorted(found)]


def muon_names(model: BMojoLM, config: TrainStageConfig) -> set[str]:
    """Names of the parameters that Muon updates; none under another optimizer."""
    return set(projection_names(model)) if isinstance(config.optimizer, MuonConfig) else set()


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of the next step in each of an optimizer's groups."""
    for group in groups:
        group["lr"] = lr * group["lr_ratio"]


def idle_group(groups: Sequence[GroupConfig], names: Iterable[str]) -> str | None:
    """What is wrong with a group without a parameter of its own, and which parameters there are; None: all have one."""
    names = list(names)
    taken = {_rule_of(name, groups) for name in names}
    for number, group in enumerate(groups):
        if number not in taken:
            has_any = any(fnmatchcase(name, group.match) for name in names)
            what = "only parameters that an earlier group has" if has_any else "no parameter"
            return f"{group.match!r} matches {what}. The model has: {', '.join(_in_short(names))}."
    return None


def names_of(model: ModelConfig) -> list[str]:
    """Names of a model's parameters, without making their values. Its vocabulary may not be known yet."""
    with torch.device("meta"):
        sized = model if model.vocab_size is not None else model.with_vocab_size(1)
        return [name for name, _ in BMojoLM(sized).named_parameters()]


def _rule_of(name: str, groups: Sequence[GroupConfig]) -> int:
    """Number of the first group that matches; -1: none."""
    return next((number for number, group in enumerate(groups) if fnmatchcase(name, group.match)), -1)


def _in_short(names: Iterable[str]) -> list[str]:
    """Names with the number of a layer left open, each once."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
