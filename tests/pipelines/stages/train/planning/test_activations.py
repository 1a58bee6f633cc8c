"""Activation bytes that are planned are those of the model: of a whole one, and of a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.fields import ActivationCheckpointing
from kernels.operator import ran, use
from pipelines.stages.train.planning.activations import activations, run_whole

SMALL: dict[str, Any] = {
    "d_model": 64, "num_heads": 2, "window_size": 32, "chunk_size": 16, "num_eidetic": 8, "d_state": 16,
    "ssm_head_dim": 32, "vocab_size": 512,
}  # fmt: skip
ROWS, SEQ_LEN = 2, 128


def model(pattern: str) -> ModelConfig:
    return ModelConfig(pattern=pattern, **SMALL)


@pytest.mark.ci
@pytest.mark.parametrize("device", ["cpu", "gpu", "neuron"])
@pytest.mark.parametrize("pattern", ["bmojo*5", "(mamba2,attention)*3,swa"])
@pytest.mark.parametrize("part", ["none", "block"])
def test_deep_models_are_worked_out_as_if_they_were_run_whole(
    device: Any, pattern: str, part: ActivationCheckpointing
) -> None:
    planned = activations(model(pattern), ROWS, SEQ_LEN, device, device != "cpu", part)
    whole = run_whole(model(pattern), ROWS, SEQ_LEN, device, device != "cpu", part)
    assert planned.saved == pytest.approx(whole.saved, rel=0.01)
    assert planned.peak == pytest.approx(whole.peak, rel=0.01)


@pytest.mark.ci
@pytest.mark.parametrize(("device", "path"), [("cpu", "cpp"), ("neuron", "static")])
@pytest.mark.parametrize("pattern", ["bmojo*3", "mamba2*3", "attention*3", "(bmojo,swa)*2"])
def test_what_is_saved_is_what_a_real_forward_saves(pattern: str, device: Any, path: str) -> None:
    real = BMojoLM(model(pattern))
    tokens_bt = torch.randint(0, 512, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with use(path), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real(tokens_bt, tokens_bt.roll(-1, 1), torch.zeros_like(tokens_bt))
    saved = sum(storage.nbytes() for storage in kept.values())
    assert activations(real.config, ROWS, SEQ_LEN, device, bf16=False).saved == pytest.approx(saved, rel=0.02)


def test_layers_with_slots_of_their_own_are_planned_with_the_most() -> None:
    of_their_own, most = (model("bmojo*3").replace(num_eidetic=slots) for slots in ((4, 16, 8), 16))
    planned, expected = (activations(config, ROWS, SEQ_LEN, "cpu", bf16=False) for config in (of_their_own, most))
    assert planned == expected


def test_what_float8_keeps_instead() -> None:
    """By hand: weights in 8 bits, not 16; the MLP's product in 8 bits, not made again; two scales for each projection.

    Four transposed inputs in 8 bits (q, kv, out, gate and up) take the place of two normed streams in 16.
    """
    d_ff, d_model, projections = 512, 64, 5
    config = model("swa*3").replace(d_ff=d_ff)
    bf16, float8 = (activations(config, ROWS, SEQ_LEN, "gpu", True, float8=on) for on in (False, True))
    weights = d_model * (d_model + 2 * d_model + d_model + 2 * d_ff + d_ff)
    product = ROWS * SEQ_LEN * d_ff
    assert float8.saved - bf16.saved == 3 * (product - weights + 2 * 4 * projections)


def test_checkpointing_lowers_what_is_saved() -> None:
    none, attention, block = (
        activations(model("bmojo*4"), ROWS, SEQ_LEN, "cpu", False, part) for part in ("none", "attention", "block")
    )
    assert block.saved < attention.saved < none.saved
    assert block.peak < none.peak


def test_it_grows_with_the_micro_batch_and_is_the_same_again() -> None:
    one, two = (activations(model("bmojo*2"), rows, SEQ_LEN, "cpu", bf16=False) for rows in (1, 2))
    assert one.peak < two.peak < 2.5 * one.peak
    activations.cache_clear()
    assert activations(model("bmojo*2"), 1, SEQ_LEN, "cpu", bf16=False) == one


def test_operators_do_not_remember_calls_that_computed_nothing() -> None:
    before = ran()
    activations(model("gated_deltanet*2"), 1, SEQ_LEN, "gpu", bf16=True)
    assert ran() == before
