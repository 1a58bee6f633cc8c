"""Whole models on the static path have the losses and gradients of those in plain torch, in float64: there neither
rounds so that another token is kept. Rotary tables and forgetting, which are float32 there, have tests of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from bmojo import ModelConfig
from bmojo.mixers import MIXERS
from kernels.operator import use
from tests.bmojo.model_family import build, configs, random_tokens, small_config

BATCH, LENGTH = 2, 40


def losses_and_gradients(config: ModelConfig, path: str) -> dict[str, torch.Tensor]:
    model = build(config)
    tokens_bt, docs_bt = random_tokens(BATCH, LENGTH), (torch.arange(LENGTH) >= 27).long().expand(BATCH, -1)
    with use(path):
        loss = model(tokens_bt, tokens_bt.roll(-1, 1), docs_bt).loss
        loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def require_agreement(config: ModelConfig) -> None:
    found, expected = losses_and_gradients(config, "static"), losses_and_gradients(config, "torch")
    for name, value in expected.items():
        if value is not None:
            assert float((found[name] - value).abs().max()) <= 1e-9 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_agrees_with_plain_torch(mixer: str) -> None:
    require_agreement(small_config(pattern=mixer))


@settings(max_examples=15, deadline=None)
@given(config=configs())
def test_whatever_the_fields_are(config: Any) -> None:
    require_agreement(config)
