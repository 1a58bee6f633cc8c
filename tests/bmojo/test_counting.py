"""Counts from the config alone, against real modules and torch's FLOP counter; and the presets they size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from bmojo import BMojoLM, ModelConfig
from bmojo.counting import count
from bmojo.mixers import MIXERS
from tests.bmojo.model_family import MIXED, build, configs, random_tokens, small_config

PRESETS = sorted(Path(__file__).parents[2].glob("configs/models/*.yaml"))
SIZES = {"130m": 130e6, "370m": 370e6, "790m": 790e6, "1.4b": 1.4e9}
VOCAB_SIZE = 50_304


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_parameters_and_state_bytes_are_those_of_the_modules(config):
    model = BMojoLM(config)
    counts = count(config, seq_len=32)
    assert counts.num_params == sum(p.numel() for p in model.parameters())
    assert sum(counts.params_by_part.values()) == counts.num_params
    _, state = model.prefill(random_tokens(1, 32))
    assert counts.state_bytes == state.num_bytes()


@pytest.mark.parametrize("fading_output", ["memory", "memory_and_residual"])
@pytest.mark.parametrize("pattern", [*(name for name in MIXERS if name != "mamba"), MIXED])
def test_flops_agree_with_the_flop_counter(pattern, fading_output):
    """Exactly, except that a tile of attention also computes keys it then masks. Mamba's scan has no products."""
    config = small_config(
        fading_output=fading_output,
        pattern=pattern,
        d_model=64,
        ssm_head_dim=16,
        d_state=16,
        window_size=256,
        chunk_size=64,
        num_eidetic=32,
    )
    t = 1024
    counts = count(config, t)
    model = build(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(1, t))
    measured = counter.get_total_flops() / t
    exact = sum(flops for part, flops in counts.flops_by_part.items() if part != "attention")
    assert counts.forward_flops_per_token == pytest.approx(sum(counts.flops_by_part.values()))
    inexact = counts.forward_flops_per_token - exact
    assert inexact * 0.999999 <= measured - exact <= 1.8 * inexact


def test_training_costs_three_forwards():
    counts = count(small_config(), 64)
    assert counts.train_flops_per_token == 3 * counts.forward_flops_per_token


def test_counting_needs_the_vocabulary():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        count(ModelConfig(), 64)


def read(path: Path) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(path.read_text())).with_vocab_size(VOCAB_SIZE)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_size_in_their_name_within_2_percent(path):
    config = read(path)
    with torch.device("meta"):
        model = BMojoLM(config)
    num_params = sum(p.numel() for p in model.parameters())
    assert num_params == count(config, 2048).num_params
    assert num_params == pytest.approx(SIZES[path.stem.rsplit("-", 1)[1]], rel=0.02)
    assert path.read_text().startswith("# ")


EQUAL_STATES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"preset": "mamba2-130m"}, {"preset": "mamba3-130m"}, {"preset": "gated_deltanet-130m"}, {"preset": "kda-130m"}),
    (
        {"preset": "mamba2_attention-130m"},
        {"preset": "gated_deltanet_attention-130m"},
        {"preset": "kda_attention-130m"},
    ),
    ({"preset": "bmojo-130m"}, {"preset": "bmojo_gated_deltanet-130m"}, {"preset": "swa-130m", "window_size": 2112}),
    ({"preset": "bmojo_wide-130m"}, {"preset": "swa-130m", "window_size": 2176}),
    (
        {"preset": "mamba2_bmojo-130m"},
        {"preset": "hybrid-130m", "window_size": 2112},
        {"preset": "samba-130m", "window_size": 2240},
    ),
)
"""Groups of models to compare at equal decoding state; docs/guide.md has them too."""


@pytest.mark.parametrize("group", EQUAL_STATES, ids=lambda group: group[0]["preset"])
def test_compared_models_have_equal_parameters_and_states_within_2_percent(group: tuple[dict[str, Any], ...]) -> None:
    found = []
    for model in group:
        config = read(PRESETS[0].with_name(f"{model['preset']}.yaml"))
        changes = {name: value for name, value in model.items() if name != "preset"}
        found.append(count(config.replace(**changes), seq_len=2048))
    sizes = [(one.num_params, one.state_bytes) for one in found]
    for smallest, largest in zip(map(min, *sizes), map(max, *sizes), strict=True):
        assert largest <= 1.02 * smallest


def test_the_guide_has_the_groups_of_equal_state() -> None:
    page = (PRESETS[0].parents[2] / "docs" / "guide.md").read_text()
    for group in EQUAL_STATES:
        names = [", ".join(str(value) for value in model.values()) for model in group]
        cells = [*(f"`{name}`" for name in names), *[""] * (4 - len(names))]
        assert f"| {' | '.join(cells)} |" in page


def test_there_is_a_preset_of_every_kind_and_size():
    names = {path.stem for path in PRESETS}
    for kind in ("bmojo", "bmojo_wide", "bmojo_f", "mamba2", "mamba2_bmojo", "swa", "attention", "hybrid"):
        assert {f"{kind}-{size}" for size in SIZES} <= names


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_says_itself_what_is_known_about_it(name: str) -> None:
    """Nothing is taken from a base class that does not know, and nothing is guessed for a mixer without counts."""
    for method in ("check", "counts", "forward", "step", "init_state"):
        assert getattr(MIXERS[name], method).__qualname__ != f"Mixer.{method}"
