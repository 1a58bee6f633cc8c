"""The short convolution beside attention: how it starts, what it reaches and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from bmojo import BMojoLM
from bmojo.config import ModelConfig
from bmojo.fields import ModelFields
from pipelines.engine.fingerprint import config_that_matters
from tests.bmojo.model_family import build, random_tokens, small_config

PATTERNS = ("attention*2", "swa*2", "bmojo_f*2", "bmojo*2")


def convolved(pattern: str, width: int = 4) -> ModelConfig:
    return small_config(pattern=pattern, attention_conv_width=width)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_begins_as_without_it(pattern: str) -> None:
    """Logits and the gradients of all other parameters, to the last bit; and the taps have a gradient."""
    tokens = random_tokens(2, 24)
    plain, model = BMojoLM(small_config(pattern=pattern)), BMojoLM(convolved(pattern))
    losses = [one(tokens, tokens.roll(-1, 1)).loss for one in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(found.pop(name).grad, parameter.grad), name
    assert {name.rsplit(".", 2)[-2] for name in found} == {"q_conv", "kv_conv"}
    assert all(parameter.grad.count_nonzero() for parameter in found.values())


def test_a_value_carries_the_tokens_before_it_and_no_others() -> None:
    """One layer, window 1: a token reads its own value alone, which three taps fill from the two before."""
    config = small_config(pattern="swa", window_size=1, chunk_size=1, attention_conv_width=3, d_ff=0)
    model = build(config)
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % config.vocab_size
    same_t = (model(tokens).logits_btv == model(changed).logits_btv).all(-1)[0]
    assert same_t.tolist() == [t not in (5, 6, 7) for t in range(12)]


def test_keys_and_values_of_y_are_not_convolved() -> None:
    """A layer that reads nothing but its fading memory: the window's values are zero, so the taps have no say."""
    config = small_config(
        pattern="bmojo_f", window_size=4, attention_conv_width=4, fading_projections="separate", fading_output="memory"
    )
    model = build(config)
    projections = model.blocks[0].mixer.projections
    torch.nn.init.zeros_(projections.kv_proj.weight)
    tokens = random_tokens(1, 30)
    before = model(tokens).logits_btv
    torch.nn.init.zeros_(projections.kv_conv.weight)
    assert torch.equal(model(tokens).logits_btv, before)


def test_without_it_a_config_has_the_fingerprint_of_before() -> None:
    assert "attention_conv_width" not in config_that_matters(ModelFields())
    assert "attention_conv_width" in config_that_matters(ModelFields(attention_conv_width=2))


@pytest.mark.parametrize("width", [1, 5])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="attention_conv_width"):
        small_config(attention_conv_width=width)
