"""Models that are filled part by part have the values of models that are filled at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from bmojo import BMojoLM, ModelConfig
from bmojo.hollow import fill_empty, fill_from, fill_initial, hollow_model
from tests.bmojo.model_family import small_config

PATTERN = "bmojo,bmojo_f,mamba,mamba2,swa,gated_deltanet,kda,mamba3"


def config(tied: bool) -> ModelConfig:
    return small_config(pattern=PATTERN, tie_embeddings=tied)


def whole(config: ModelConfig, seed: int) -> BMojoLM:
    model = BMojoLM(config)
    model.init_weights(seed)
    return model


def taken_out(model: BMojoLM, parts: Iterator[nn.Module]) -> tuple[dict[str, torch.Tensor], int]:
    """The values, each part's taken out before the next one comes; and the most elements that were there at once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    most = 0
    for part in parts:
        most = max(most, sum(p.untyped_storage().nbytes() // 4 for p in names if p.numel()))
        for parameter in part.parameters():
            if parameter.numel():
                found[names[parameter]] = parameter.detach().clone()
                parameter.data = torch.empty(0)
    return found, most


@pytest.mark.parametrize("tied", [False, True])
def test_initial_values_are_those_of_the_whole_model_and_never_all_there(tied: bool) -> None:
    model, expected = hollow_model(config(tied)), dict(whole(config(tied), seed=3).named_parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in expected.items()}
    found, most = taken_out(model, fill_initial(model, seed=3))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    largest = max(sum(p.numel() for p in part.parameters()) for part in [*whole(config(tied), 0).children()][1])
    assert most < 1.5 * largest < sum(p.numel() for p in expected.values()) / 2


@pytest.mark.parametrize("fill", [fill_initial, None], ids=["initial", "from"])
def test_a_model_that_keeps_its_parts_is_the_whole_model(fill: Callable[..., Iterator[nn.Module]] | None) -> None:
    expected, model = whole(config(True), seed=3), hollow_model(config(True))
    parts = fill_initial(model, 3) if fill else fill_from(model, dict(expected.named_parameters()).__getitem__)
    assert len(list(parts)) == len(config(True).mixers) + 3
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embedding.weight
    tokens = (torch.arange(32) % 7).view(1, 32)
    assert torch.equal(model(tokens).logits_btv, expected(tokens).logits_btv)


def test_a_hollow_model_takes_no_memory_until_it_is_filled() -> None:
    model = hollow_model(config(False))
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 4 * len(list(model.parameters()))
    list(fill_empty(model))
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in model.parameters())
