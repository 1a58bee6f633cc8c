"""The whole model on Triton's kernels, in the interpreter, does what it does on plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bmojo import BMojoLM
from kernels.again import MadeAgain
from kernels.operator import use
from tests.bmojo.model_family import build, random_tokens, small_config
from tests.kernels.memory import memory_of_nan

NUM_STEPS = 3  # the second shows the gradients of the first, the third those of weights that both paths moved


def tiny_model(pattern: str) -> BMojoLM:
    config = small_config(
        pattern=pattern, window_size=4, chunk_size=4, num_eidetic=3, d_ff=8, innovation_predictor="learned",
        innovation_tau=9.0, num_kv_heads=2, ssm_num_groups=2,
    )  # fmt: skip
    return build(config, dtype=torch.float32)


def training_losses(path: str, pattern: str) -> list[float]:
    model = tiny_model(pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    docs = torch.tensor([[0] * 7 + [1] * 6, [0] * 13])
    losses = []
    for step in range(NUM_STEPS):
        tokens = random_tokens(2, 13, seed=step)
        with use(path):
            loss = model(tokens, tokens.roll(-1, 1), docs).loss
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.ci
@pytest.mark.parametrize(
    "pattern", ["bmojo", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bmojo_f", "swa", "attention", "mamba2"))]
)
def test_a_sequence_longer_than_any_tile(pattern):
    """So that a kernel of which only the first program is right does not pass."""
    config = small_config(
        pattern=pattern, d_model=64, num_heads=1, window_size=20, chunk_size=20, num_eidetic=5,
        fading_output="memory_and_residual",
    )  # fmt: skip
    model, tokens = build(config, dtype=torch.float32), random_tokens(1, 70)
    docs = torch.tensor([[0] * 31 + [1] * 39])
    losses, grads = {}, {}
    for path in ("torch", "triton"):
        model.zero_grad()
        with use(path), memory_of_nan():
            loss = model(tokens, tokens.roll(-1, 1), docs).loss
            loss.backward()
        losses[path], grads[path] = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
    for name, grad in grads["torch"].items():
        torch.testing.assert_close(grads["triton"][name], grad, rtol=0, atol=1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.ci
@pytest.mark.parametrize(
    "pattern", ["mamba2,swa", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bmojo,mamba2", "bmojo_f,swa"))]
)
def test_training_follows_plain_torch(pattern):
    losses = training_losses("torch", pattern)
    assert losses == pytest.approx(training_losses("triton", pattern), rel=1e-4)
    assert len({round(loss, 3) for loss in losses}) == NUM_STEPS


def decoded(path: str, model: BMojoLM, tokens: Tensor, num_prefilled: int) -> list[Tensor]:
    """Logits after a prefix and after each further token."""
    with use(path):
        logits, state = model.prefill(tokens[:, :num_prefilled])
        seen = [logits]
        for i in range(num_prefilled, tokens.shape[1]):
            logits, state = model.step(tokens[:, i], state)
            seen.append(logits)
    return seen


@pytest.mark.ci
@pytest.mark.parametrize(
    ("pattern", "num_tokens"),
    [
        ("bmojo", 13),
        ("swa,mamba2", 11),
        *(pytest.param(p, 17, marks=pytest.mark.slow) for p in ("bmojo*2", "bmojo_f,swa", "attention,mamba,mamba2")),
    ],
)
def test_decoding_equals_plain_torch(pattern, num_tokens):
    """Over the edge of a chunk."""
    model, tokens = tiny_model(pattern), random_tokens(2, num_tokens)
    got, want = (decoded(path, model, tokens, num_prefilled=8) for path in ("triton", "torch"))
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, i=i: f"after {i} steps: {text}")


def test_decoding_continues_a_prefix_that_ends_within_a_chunk():
    """Slots filled by earlier pieces go through the selection's and the attention's state."""
    model, tokens = tiny_model("bmojo"), random_tokens(1, 23)
    with use("triton"), torch.no_grad():
        whole = model(tokens).logits_btv
        logits, state = model.prefill(tokens[:, :16])
        torch.testing.assert_close(logits, whole[:, 15], rtol=1e-4, atol=1e-5)
        logits, state = model.prefill(tokens[:, 16:22], state)
        torch.testing.assert_close(logits, whole[:, 21], rtol=1e-4, atol=1e-5)
        logits, _ = model.step(tokens[:, 22], state)
        torch.testing.assert_close(logits, whole[:, 22], rtol=1e-4, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
    "pattern", ["bmojo", *(pytest.param(p, marks=pytest.mark.slow) for p in ("mamba2,swa", "bmojo_f,attention"))]
)
def test_what_is_made_again_has_the_bits_of_what_would_have_been_kept(pattern, monkeypatch):
    """Under autocast, with documents, in memory filled with NaN."""
    monkeypatch.setattr("bmojo.layers.counts_as_gpu", lambda x: True)  # so that norms write what products read

    def differentiated(made_again: MadeAgain) -> list[Tensor]:
        model = tiny_model(pattern)
        model.made_again = made_again
        tokens, docs = random_tokens(1, 13), torch.tensor([[0] * 7 + [1] * 6])
        with use("triton"), memory_of_nan():
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = model(tokens, tokens.roll(-1, 1), docs).loss
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    kept = differentiated("nothing")
    for made_again in ("duplicates", "small"):
        for one, other in zip(differentiated(made_again), kept, strict=True):
            assert torch.equal(one, other), made_again
