"""A model on disk."""

from __future__ import annotations

import pytest
import torch
from model_family import build, random_tokens, small_config
from safetensors.torch import load_file

from bmojo.checkpoint_io import load_pretrained, save_pretrained, write_digests


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_model_comes_back_exactly(tie_embeddings, dtype, tmp_path):
    model = build(small_config(pattern="mamba,mamba2,bmojo,attention", tie_embeddings=tie_embeddings), dtype=dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    tokens = random_tokens(2, 30)
    assert torch.equal(loaded(tokens).logits_btv, model(tokens).logits_btv)
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) is not tie_embeddings
    assert (loaded.head.weight is loaded.embedding.weight) is tie_embeddings


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        load_pretrained(tmp_path)


def test_weights_of_another_config_are_refused(tmp_path):
    save_pretrained(build(small_config()), tmp_path / "a")
    save_pretrained(build(small_config(d_model=32)), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    write_digests(tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit config.json"):
        load_pretrained(tmp_path / "a")
