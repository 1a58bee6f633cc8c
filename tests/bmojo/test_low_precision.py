"""bfloat16: scores and ranks stay float32, slots hold keys rounded once, and only near ties are decided otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bmojo import BMojoLM
from bmojo.mixers.base import LayerMemory
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.operator import use
from kernels.pointwise import rms_norm
from tests.bmojo.model_family import build, random_tokens, small_config

NEAR = 0.05  # in log e: what rounding a layer's input, weights and products to bfloat16 moves a score of 64 channels by
SEEDS = range(3)
ONE_ROUNDING = 1.001 * 2**-8


def one_layer(seed: int) -> BMojoLM:
    fields = {"d_model": 64, "ssm_head_dim": 16, "d_state": 16, "window_size": 8, "chunk_size": 4, "num_eidetic": 6}
    config = small_config(pattern="bmojo", fading_projections="separate", **fields)
    return build(config, seed, torch.float32)


@torch.no_grad()
def memory_of(model: BMojoLM, tokens_bt: Tensor) -> LayerMemory:
    (memory,) = model(tokens_bt, return_memory=True).memory
    return memory


def sets(position_bjm: Tensor) -> list[list[set[int]]]:
    return [[set(row) - {-1} for row in rows] for rows in position_bjm.tolist()]


def widest_gap(first: list[list[set[int]]], second: list[list[set[int]]], log_e_bt: Tensor) -> float:
    """How much worse, by these scores, a token is that only the second keeps than one that only the first keeps."""
    gaps = [0.0]
    for row, row_sets in enumerate(zip(first, second, strict=True)):
        for own, other in zip(*row_sets, strict=True):
            gaps += [float(log_e_bt[row, a] - log_e_bt[row, b]) for a in own - other for b in other - own]
    return max(gaps)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_bfloat16_keeps_what_float32_keeps_but_for_near_ties(seed: int, autocast: bool) -> None:
    model, tokens_bt = one_layer(seed), random_tokens(2, 160, seed)
    exact = memory_of(model, tokens_bt)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            low = memory_of(model, tokens_bt)
    else:
        low = memory_of(copy.deepcopy(model).bfloat16(), tokens_bt)
    assert low.innovation_bt.dtype == torch.float32
    kept, kept_low = sets(exact.kept_position_bjm), sets(low.kept_position_bjm)
    assert widest_gap(kept, kept_low, exact.innovation_bt.log()) < NEAR
    spread = exact.innovation_bt.log().std()
    assert spread > 3 * NEAR  # so the bound says something


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kept_set_is_ranked_by_float32_scores(seed: int) -> None:
    """Scores that would be equal in bfloat16 are told apart."""
    model = one_layer(seed).bfloat16()
    config = model.config
    memory = memory_of(model, random_tokens(1, 160, seed))
    scores = memory.innovation_bt[0].tolist()
    assert len(set(scores)) > 1.5 * len(set(memory.innovation_bt[0].bfloat16().tolist()))
    for chunk, kept in enumerate(memory.kept_position_bjm[0].tolist()):
        candidates = range(max(0, chunk * config.chunk_size - config.window_size + 1))
        best = sorted(candidates, key=lambda i: (-scores[i], i))[: config.num_eidetic]
        assert [position for position in kept if position >= 0] == best


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_decoding_in_bfloat16_keeps_what_the_whole_sequence_does_but_for_near_ties(seed: int) -> None:
    model, tokens_bt = one_layer(seed).bfloat16(), random_tokens(2, 120, seed)
    memory = memory_of(model, tokens_bt)
    _, state = model.prefill(tokens_bt[:, :40])
    for t in range(40, 120):
        _, state = model.step(tokens_bt[:, t], state)
    (layer,) = state.layers
    slots = layer.eidetic.slots
    assert slots.log_e.dtype == layer.eidetic.log_e.dtype == torch.float32
    kept, kept_decoding = (sets(kept[:, None]) for kept in (memory.kept_position_bjm[:, -1], slots.position))
    assert widest_gap(kept, kept_decoding, memory.innovation_bt.log()) < NEAR


@pytest.mark.parametrize("prefilled", [1, 22, 61])
@torch.no_grad()
def test_slots_hold_keys_and_values_as_they_were_projected(prefilled: int) -> None:
    """To the last bit in bfloat16: rotating a key to its position and back would round it again."""
    model, tokens_bt = one_layer(0).bfloat16(), random_tokens(1, 90)
    mixer, projected = model.blocks[0].mixer, []

    def project(_module: object, _inputs: object, u: Tensor) -> None:
        projected.append(mixer.projections.kv_proj(u).view(-1, 2, 64))  # with as many rows as the mixer does

    model.blocks[0].mixer_norm.register_forward_hook(project)
    _, state = model.prefill(tokens_bt[:, :prefilled])
    for t in range(prefilled, 90):
        _, state = model.step(tokens_bt[:, t], state)
    keys, values = torch.cat(projected).unbind(1)
    (layer,) = state.layers
    slots = layer.eidetic.slots
    position = slots.position[0]
    assert (position >= 0).all()
    assert torch.equal(slots.k[0].flatten(1), keys[position])
    assert torch.equal(slots.v[0].flatten(1), values[position])


def test_a_norm_in_bfloat16_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 96, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(96, generator=generator).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=ONE_ROUNDING, atol=0)
    cotangent = torch.randn(50, 96, generator=generator).bfloat16()
    (grad,) = torch.autograd.grad(found, x, cotangent)
    (exact_grad,) = torch.autograd.grad(exact, x, cotangent.double())
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - exact_grad).abs().max() < 2**-7 * exact_grad.abs().max()


def test_a_convolution_in_bfloat16_is_rounded_once_whole_and_step_by_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((2, 40, 24), (24, 4)))
    exact, _ = causal_conv1d(x.double(), weight.double())
    state = torch.zeros(2, 3, 24, dtype=torch.bfloat16)
    with use("torch"):
        whole, _ = causal_conv1d(x, weight)
        steps = torch.stack([causal_conv1d_step(x[:, t], weight, state) for t in range(40)], 1)
    for found in (whole, steps):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=ONE_ROUNDING, atol=1e-6)
