"""Every mixer, in every form it computes, against the literal loop over tokens of bmojo/reference.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmojo import BMojoLM, ModelConfig
from bmojo.mixers.selection import random_rank
from bmojo.reference import reference_forward
from tests.bmojo.model_family import PATTERNS, VOCAB_SIZE, build, configs, random_tokens, small_config

GOLDEN = Path(__file__).with_name("golden_logits.json")


def random_documents(num_tokens: int, seed: int) -> Tensor:
    starts = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.12
    return starts.long().cumsum(0)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), num_tokens=st.integers(1, 45), documents=st.booleans())
def test_a_whole_sequence_is_what_the_loop_gives(
    pattern: str, data: st.DataObject, seed: int, num_tokens: int, documents: bool
) -> None:
    config = data.draw(configs((pattern,)))
    model, tokens_t = build(config, seed), random_tokens(1, num_tokens, seed)[0]
    doc_ids_t = random_documents(num_tokens, seed) if documents else None
    wanted_t = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.3
    expected = reference_forward(model, tokens_t, doc_ids_t, wanted_t)
    docs_1t = None if doc_ids_t is None else doc_ids_t[None]
    with torch.no_grad():
        found = model(tokens_t[None], doc_ids_bt=docs_1t, return_memory=True, wanted_bt=wanted_t[None])
    assert_close(found.logits_btv[0], expected.logits_tv)
    layers = [layer for layer in found.memory if layer is not None and layer.kept_position_bjm is not None]
    assert len(layers) == len(expected.eidetic_lt)
    for layer, innovation_t, eidetic_t in zip(layers, expected.score_lt, expected.eidetic_lt, strict=True):
        if config.selection == "innovation":
            assert_close(layer.innovation_bt[0].log(), torch.tensor(innovation_t, dtype=torch.float64))
        for t in range(num_tokens):
            if doc_ids_t is None:
                kept = layer.kept_position_bjm[0, t // config.chunk_size].tolist()
                assert [i for i in kept if i >= 0] == eidetic_t[t]


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), num_tokens=st.integers(2, 45))
def test_decoding_is_what_the_loop_gives(pattern: str, data: st.DataObject, seed: int, num_tokens: int) -> None:
    config = data.draw(configs((pattern,)))
    model, tokens_t = build(config, seed), random_tokens(1, num_tokens, seed)[0]
    num_read = data.draw(st.integers(1, num_tokens - 1))
    expected_tv = reference_forward(model, tokens_t).logits_tv
    logits_1v, state = model.prefill(tokens_t[None, :num_read])
    assert_close(logits_1v[0], expected_tv[num_read - 1])
    for t in range(num_read, num_tokens):
        logits_1v, state = model.step(tokens_t[t : t + 1], state)
        assert_close(logits_1v[0], expected_tv[t])


def test_scores_of_faint_outputs_are_what_the_loop_gives() -> None:
    """|y|^2 is near the constant that keeps the score finite, so its size shows."""
    model = build(small_config(pattern="bmojo"))
    with torch.no_grad():
        model.blocks[0].mixer.ssm.out_proj.weight.mul_(1e-3)
        tokens_t = random_tokens(1, 30)[0]
        (layer,) = model(tokens_t[None], return_memory=True).memory
    (innovation_t,) = reference_forward(model, tokens_t).score_lt
    assert_close(layer.innovation_bt[0].log(), torch.tensor(innovation_t, dtype=torch.float64))


def test_random_selection_spreads_over_positions() -> None:
    """Ranks are distinct and near uniform, so what is kept is a sample of the whole past and not its beginning."""
    rank = random_rank(torch.arange(20_000))
    assert len(rank.unique()) > 0.99 * len(rank)
    assert torch.allclose(rank.view(20, -1).mean(1), torch.tensor(0.5), atol=0.05)
    assert abs(float(torch.corrcoef(torch.stack([torch.arange(20_000.0), rank]))[0, 1])) < 0.05


@pytest.mark.parametrize("num_layers", [4, 8])
def test_initial_values_are_those_of_the_table(num_layers: int) -> None:
    """Standard deviations by the table in bmojo.model, to 10 %."""
    pattern = f"(bmojo,mamba2,attention,mamba)*{num_layers // 4}"
    config = ModelConfig(
        pattern=pattern, vocab_size=512, d_model=128, num_heads=4, ssm_head_dim=32, fading_output="memory_and_residual"
    )
    model = BMojoLM(config)
    residual = config.init_std / math.sqrt(2 * config.num_layers)
    for name, weight in model.state_dict().items():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("ssm.out_proj.weight"):
            expected = weight.shape[1] ** -0.5
        elif last == "fading_gain":
            assert (weight == 0.35).all()
            continue
        elif last in ("out_proj", "down_proj"):
            expected = residual
        elif last in ("embedding", "head", "in_proj", "q_proj", "kv_proj", "gate_up_proj", "x_proj"):
            expected = config.init_std
        else:
            continue
        assert float(weight.std()) == pytest.approx(expected, rel=0.1), name
        assert abs(float(weight.mean())) < 0.1 * expected, name


GOLDEN_MODELS: dict[str, dict[str, Any]] = {pattern: {"pattern": pattern} for pattern in PATTERNS} | {
    "bmojo*2, memory_and_residual": {"pattern": "bmojo*2", "fading_output": "memory_and_residual"}
}


def golden_model(name: str) -> BMojoLM:
    fields = {"fading_output": "memory"} | GOLDEN_MODELS[name]
    return BMojoLM(small_config(init_std=0.3, qk_norm=True, num_kv_heads=2, innovation_tau=7.0, **fields))


def golden_logits(name: str) -> list[float]:
    """The first five logits of three positions; weights are the initial ones of seed 0, in float32."""
    tokens_bt = (torch.arange(30) * 7 % VOCAB_SIZE)[None]
    with torch.no_grad():
        logits_btv = golden_model(name)(tokens_bt).logits_btv
    return [float(x) for x in logits_btv[0, [3, 17, 29], :5].flatten()]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_logits_of_the_initial_weights_never_change(name: str) -> None:
    """A change here changes every model trained before: raise the train stage's code version, then write them again
    with `python -m tests.bmojo.test_reference`."""
    expected = json.loads(GOLDEN.read_text())[name]
    assert golden_logits(name) == pytest.approx(expected, rel=1e-4, abs=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: golden_logits(name) for name in GOLDEN_MODELS}, indent=1) + "\n")
