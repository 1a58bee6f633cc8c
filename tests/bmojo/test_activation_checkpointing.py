"""Activation checkpointing: the same bits, and less is kept between the forward and the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.fields import ActivationCheckpointing

NUM_TOKENS = 96
CONFIG = ModelConfig(
    pattern="(bmojo,mamba2,swa,gated_deltanet,kda)*1", vocab_size=64, d_model=64, num_heads=2, window_size=32,
    chunk_size=16, num_eidetic=8, d_state=16, ssm_head_dim=32, innovation_predictor="learned",
    fading_output="memory_and_residual",
)  # fmt: skip


class Backward(NamedTuple):
    """A loss, its gradients, and bytes that were kept for them."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    kept_bytes: int


def differentiated(part: ActivationCheckpointing, doc_ids_bt: torch.Tensor | None) -> Backward:
    model = BMojoLM(CONFIG)
    model.checkpoint_activations(part)
    tokens_bt = torch.randint(0, 64, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens_bt, tokens_bt.roll(-1, 1), doc_ids_bt).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Backward(loss.detach(), gradients, sum(storage.nbytes() for storage in kept.values()))


@pytest.fixture(scope="module")
def documents() -> torch.Tensor:
    return (torch.arange(NUM_TOKENS) >= torch.tensor([[37], [64]])).long()


@pytest.fixture(scope="module")
def by_part(documents: torch.Tensor) -> dict[ActivationCheckpointing, Backward]:
    parts: tuple[ActivationCheckpointing, ...] = ("none", "attention", "block")
    return {part: differentiated(part, documents) for part in parts}


@pytest.mark.parametrize("part", ["attention", "block"])
def test_loss_and_gradients_have_the_same_bits(
    by_part: dict[ActivationCheckpointing, Backward], part: ActivationCheckpointing
) -> None:
    plain, again = by_part["none"], by_part[part]
    assert torch.equal(again.loss, plain.loss)
    assert again.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(again.gradients[name], value) for name, value in plain.gradients.items())


def test_each_part_keeps_less_than_the_one_before(by_part: dict[ActivationCheckpointing, Backward]) -> None:
    none, attention, block = (by_part[part].kept_bytes for part in ("none", "attention", "block"))
    assert block < attention / 2 < none / 4
    # Of each block its input stays, in two terms; beside them what the embedding, the last norm and the loss keep.
    stream_bytes = 4 * 2 * NUM_TOKENS * CONFIG.d_model
    assert block < (2 * CONFIG.num_layers + 6) * stream_bytes


def test_documents_stay_apart_when_computed_again(
    by_part: dict[ActivationCheckpointing, Backward], documents: torch.Tensor
) -> None:
    assert not torch.equal(differentiated("block", None).loss, by_part["block"].loss)
    assert torch.equal(differentiated("block", documents).loss, by_part["block"].loss)
