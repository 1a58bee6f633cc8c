"""Groups of parameters: whose learning rate and decay they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from base.errors import UserError
from bmojo import BMojoLM
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.groups import names_of, parameter_groups, set_lr
from tests.pipelines.stages.train.trainer_contract import NUM_SAMPLES, VOCAB_SIZE, global_batch, initial_model

MakeConfig = Callable[..., TrainStageConfig]


@pytest.fixture(scope="module")
def make(train_config: MakeConfig, tiny_model: dict[str, Any]) -> MakeConfig:
    sizes = {"global_batch_size": NUM_SAMPLES, "micro_batch_size": NUM_SAMPLES}
    return lambda **changes: train_config(model=tiny_model | {"vocab_size": VOCAB_SIZE}, **sizes, **changes)


def settings_of(config: TrainStageConfig, lr: float = 1.0) -> dict[str, tuple[float, float]]:
    """(learning rate, decay) of each parameter."""
    model = initial_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    set_lr(groups, lr)
    found = [(names[p], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names), "each parameter is in one group"
    return dict(found)


def test_without_groups_the_model_decides(make: MakeConfig) -> None:
    config = make(weight_decay=0.3)
    model = initial_model(config)
    ours, own = parameter_groups(model, config), model.param_groups(0.3)
    assert [[id(p) for p in group["params"]] for group in ours] == [[id(p) for p in group["params"]] for group in own]
    assert [group["weight_decay"] for group in ours] == [0.3, 0.0]
    assert [group["lr_ratio"] for group in ours] == [1.0, 1.0]


def test_a_group_sets_what_it_names_and_the_first_that_matches_counts(make: MakeConfig) -> None:
    plain = settings_of(make(weight_decay=0.3), lr=2.0)
    groups = [
        {"match": "embedding.*", "lr_ratio": 0.5, "weight_decay": 0.01},
        {"match": "*.A_log", "lr_ratio": 0},
        {"match": "blocks.0.*", "lr_ratio": 0.25},
    ]
    found = settings_of(make(weight_decay=0.3, groups=groups), lr=2.0)
    for name, (_, decay) in plain.items():
        if name == "embedding.weight":
            expected = (1.0, 0.01)
        elif name.endswith(".A_log"):
            expected = (0.0, decay)
        elif name.startswith("blocks.0."):
            expected = (0.5, decay)
        else:
            expected = (2.0, decay)
        assert found[name] == expected, name


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["embeddings.*"], r"'embeddings\.\*' matches no parameter\. The model has: embedding\.weight, blocks\.\*\."),
        (["blocks.*", "*.A_log"], r"'\*\.A_log' matches only parameters that an earlier group has"),
    ],
)
def test_a_group_without_parameters_is_refused(make: MakeConfig, groups: list[str], message: str) -> None:
    config = make(groups=[{"match": match} for match in groups])
    with pytest.raises(UserError, match=message):
        parameter_groups(initial_model(config), config)


def test_names_are_those_of_the_model_whatever_its_vocabulary(make: MakeConfig) -> None:
    config = make()
    names = [name for name, _ in initial_model(config).named_parameters()]
    assert names_of(config.model) == names_of(config.model.replace(vocab_size=None)) == names


def test_torch_takes_the_steps_that_the_groups_say(make: MakeConfig) -> None:
    """Against a step by hand: AdamW's first step is lr * sign(gradient), after the decay."""
    config = make(groups=[{"match": "embedding.*", "lr_ratio": 0.1, "weight_decay": 0.5}], eps=1e-30)
    model: BMojoLM = initial_model(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps)
    loss = model(*global_batch(0)).loss
    loss.backward()
    set_lr(optimizer.param_groups, 1e-2)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        lr = 1e-3 if name == "embedding.weight" else 1e-2
        decay = {"embedding.weight": 0.5}.get(name, 0.1 if name.endswith(("_proj.weight", "conv_weight")) else 0.0)
        expected = before[name] * (1 - lr * decay) - lr * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-8)
