"""Initialisation, loss and numbers at the edge."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bmojo import BMojoLM, float32_names
from tests.bmojo.model_family import PATTERNS, build, random_tokens, small_config


@pytest.mark.parametrize("pattern", PATTERNS)
def test_init_weights_is_determined_by_its_seed(pattern):
    models = [BMojoLM(small_config(pattern=pattern)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_ssm_parameters_start_in_their_ranges():
    config = small_config(pattern="mamba2,mamba,bmojo", d_model=64)
    for name, parameter in BMojoLM(config).named_parameters():
        if name.endswith("dt_bias"):
            dt = F.softplus(parameter)
            assert dt.min() >= config.dt_min * 0.999
            assert dt.max() <= config.dt_max * 1.001
        if name.endswith("A_log") and parameter.dim() == 1:
            assert parameter.exp().min() >= config.a_min
            assert parameter.exp().max() <= config.a_max


def test_loss_of_an_untrained_model_is_near_that_of_a_uniform_guess():
    config = small_config(vocab_size=500, d_model=64, tie_embeddings=False)
    tokens = torch.randint(500, (4, 64), generator=torch.Generator().manual_seed(0))
    assert abs(BMojoLM(config)(tokens, tokens.roll(-1, 1)).loss - math.log(500)) < 0.1


def test_param_groups_hold_every_parameter_once_and_spare_ssm_parameters_norms_and_embeddings():
    model = BMojoLM(small_config(pattern="mamba,mamba2,bmojo", qk_norm=True, innovation_predictor="learned"))
    decayed, kept = model.param_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for p in decayed["params"] + kept["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    spared = {id(p) for p in kept["params"]}
    for name, parameter in model.named_parameters():
        if name in float32_names(model) or "norm" in name or name.startswith("embedding"):
            assert id(parameter) in spared, name


def test_ssm_parameters_keep_float32_under_bfloat16_autocast():
    model = BMojoLM(small_config(pattern="mamba,mamba2,bmojo"))
    tokens = random_tokens(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens, tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_chunked_loss_is_cross_entropy_plus_z_loss_with_its_gradients(z_loss_weight, monkeypatch):
    monkeypatch.setattr("kernels.cross_entropy.torch_path.CHUNK_LOGITS", 23 * 7)  # several chunks, the last one short
    model = build(small_config(z_loss_weight=z_loss_weight))
    tokens = random_tokens(2, 20)
    targets = tokens.roll(-1, 1)
    targets[:, 5:9] = -100
    result = model(tokens, targets, token_losses=True)
    result.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(tokens).logits_btv
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    want = want + z_loss_weight * logits.logsumexp(-1)[targets >= 0].square().mean()
    want.backward()
    torch.testing.assert_close(result.loss, want, rtol=0, atol=1e-12)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-12)
    assert result.num_targets == 32
    assert result.nll_bt.dtype == torch.float32
    assert (result.nll_bt[:, 5:9] == 0).all()


def test_loss_without_any_target_is_zero():
    model = build(small_config())
    result = model(random_tokens(1, 5), torch.full((1, 5), -100))
    result.loss.backward()
    assert result.loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_learned_predictor_lowers_its_own_loss_and_leaves_the_rest_alone():
    config = small_config(pattern="bmojo", innovation_predictor="learned", innovation_loss_weight=1.0)
    model = build(config)
    tokens = random_tokens(2, 40)
    predictor = model.blocks[0].mixer.innovation.predictor
    with_loss = model(tokens, tokens).loss
    with_loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    plain = BMojoLM(config.replace(innovation_loss_weight=0.0)).double()
    plain.load_state_dict(model.state_dict())
    plain_loss = plain(tokens, tokens).loss
    plain_loss.backward()
    assert with_loss > plain_loss
    for name, parameter in plain.named_parameters():
        if "predictor" not in name:
            assert torch.equal(parameter.grad, grads[name]), name
    optimizer = torch.optim.SGD([predictor], lr=0.05)
    before = model(tokens, tokens).loss.item()
    for _ in range(20):
        optimizer.zero_grad()
        model(tokens, tokens).loss.backward()
        optimizer.step()
    assert model(tokens, tokens).loss.item() < before


@pytest.mark.parametrize("dt_bias", [-1e4, -60.0, 30.0, 1e4])
@pytest.mark.parametrize("pattern", ["mamba2*2", "mamba*2", "mamba3*2", "kda*2", "bmojo*2"])
def test_extreme_step_sizes_stay_finite(pattern, dt_bias):
    model = BMojoLM(small_config(pattern=pattern))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(dt_bias)
    tokens = random_tokens(1, 200)
    loss = model(tokens, tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pattern", ["mamba,mamba2,bmojo", "mamba3"])
def test_no_nan_or_inf_at_65536_tokens(pattern):
    model = BMojoLM(small_config(pattern=pattern, window_size=256, chunk_size=256))
    tokens = random_tokens(1, 65_536)
    loss = model(tokens, tokens.roll(-1, 1)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_small_model_overfits_one_batch():
    model = BMojoLM(small_config(pattern="mamba2,bmojo", d_model=32))
    tokens = random_tokens(4, 32)
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
