"""Models that train in float8: which products are, what stays as it was, and that they learn as in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bmojo import BMojoLM
from bmojo.float8 import float8_projections, mark_float8, train_in_float8
from bmojo.layers import Linear
from bmojo.mixers import MIXERS
from kernels import float8_linear as operator
from tests.bmojo.model_family import VOCAB_SIZE, build, random_tokens, small_config

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that are multiplied in float8."""
    seen: list[tuple[int, ...]] = []
    call = operator.float8_linear

    def noted(x: Tensor, weight_oi: Tensor) -> Tensor:
        seen.append(tuple(weight_oi.shape))
        return call(x, weight_oi)

    monkeypatch.setattr("bmojo.layers.float8_linear", noted)
    return seen


def loss_of(model: BMojoLM, tokens: Tensor) -> Tensor:
    loss = model(tokens, tokens.roll(-1, 1)).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_projection_of_a_block_is_in_float8_where_a_gradient_is_wanted(mixer, products):
    model = build(small_config(pattern=mixer, chunk_size=4), dtype=torch.float32)
    mark_float8(model)
    tokens = random_tokens(2, 16)
    loss_of(model, tokens).backward()
    left_out = {f"blocks.0.mixer.{name}" for name in ("x_proj", "dt_proj", "gate_proj", "decay_proj")}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    assert set(float8_projections(model)) == set(linears) - left_out
    wanted = {tuple(module.weight.shape) for name, module in linears.items() if name not in left_out}
    assert set(products) == wanted
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_a_gradient_the_model_is_what_it_was(products):
    model = build(small_config(), dtype=torch.float32)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        before = loss_of(model, tokens)
        mark_float8(model)
        assert torch.equal(loss_of(model, tokens), before)
    assert not products
    assert not torch.equal(loss_of(model, tokens), before)


def test_weights_and_their_names_stay():
    model = build(small_config(), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mark_float8(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("part", ["attention", "block"])
def test_activation_checkpointing_changes_no_bit(part):
    grads = []
    for checkpointing in ("none", part):
        model = build(small_config(), dtype=torch.float32)
        model.checkpoint_activations(checkpointing)
        mark_float8(model)
        loss_of(model, random_tokens(2, 16)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.ci
def test_a_model_learns_in_float8_as_it_does_in_float32():
    """The loss falls from 3.2 to 0.76 nats. Two seeds of initial weights differ by up to 0.08 on the way."""
    t = torch.arange(4 * 64).view(4, 64)
    tokens = (7 * t * t + t) % VOCAB_SIZE
    curves = []
    for in_float8 in (False, True):
        model = BMojoLM(small_config(d_model=32, d_ff=64))
        if in_float8:
            mark_float8(model)
        optimizer, curve = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(40):
            loss = loss_of(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    float32, float8 = curves
    assert float32[-1] < 0.8
    assert not torch.equal(float8, float32)
    assert (float8 - float32).abs().max() < 0.02


def test_what_cannot_run_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"need an NVIDIA GPU, and tensors are on 'cpu'\. Use precision: bf16\."):
        train_in_float8(build(small_config()), CPU)
    with pytest.raises(
        ValueError, match=r"multiple of 16 channels, and 2 of 14 do not: blocks\.0\.mlp\.down_proj reads 24"
    ):
        mark_float8(build(small_config(d_ff=24)))


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert operator.device_refuses(torch.device("cuda")) == (
        "float8 products need compute capability 8.9 (Ada, Hopper or newer), and NVIDIA A100 has 8.0"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert operator.device_refuses(torch.device("cuda")) is None
