"""The recurrent layers that a fading memory can be."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.fields import ModelFields
from bmojo.layers import RotaryTable
from bmojo.mixers.base import Sequence
from bmojo.mixers.fading import FADING
from pipelines.engine.fingerprint import config_that_matters


def test_the_field_names_the_table() -> None:
    assert get_args(ModelFields.model_fields["fading_ssm"].annotation) == tuple(FADING)


@pytest.mark.parametrize("fading_ssm", FADING)
@pytest.mark.parametrize("d_model", [256, 512])
def test_y_starts_with_the_scale_of_u(fading_ssm: str, d_model: int) -> None:
    """So that keys made from y by u's projections stand beside those of u under one softmax."""
    config = ModelConfig(
        pattern="bmojo", vocab_size=64, d_model=d_model, num_heads=4, ssm_head_dim=32, fading_ssm=fading_ssm
    )
    ssm = BMojoLM(config).blocks[0].mixer.ssm
    u_btd = torch.randn(2, 200, d_model, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTable(torch.arange(200), config.attention_head_dim, config.rope_theta, torch.float32)
    with torch.no_grad():
        y_btd = ssm(u_btd, Sequence(200, 0, None, rotary)).out_btd
    assert float(y_btd.square().mean().sqrt()) == pytest.approx(1, rel=0.15)


def test_a_head_that_does_not_fit_is_refused_by_the_fields_name() -> None:
    with pytest.raises(ValueError, match=r"fading_expand \* d_model = 64 is not a multiple of ssm_head_dim=48"):
        ModelConfig(pattern="bmojo", d_model=64, num_heads=4, ssm_head_dim=48, fading_ssm="gated_deltanet")


def test_the_gain_of_y_starts_as_the_field_says() -> None:
    config = ModelConfig(pattern="bmojo*2", vocab_size=64, d_model=64, num_heads=2, fading_output="memory_and_residual")
    for gain, model in [(0.35, BMojoLM(config)), (1.5, BMojoLM(config.replace(fading_gain=1.5)))]:
        assert all((block.mixer.fading_gain == torch.tensor(gain)).all() for block in model.blocks)


def test_the_usual_gain_has_the_fingerprint_of_before() -> None:
    assert "fading_gain" not in config_that_matters(ModelFields())
    assert "fading_gain" in config_that_matters(ModelFields(fading_gain=0.1))
