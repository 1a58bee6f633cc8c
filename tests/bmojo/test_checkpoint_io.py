"""A model on disk."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bmojo.checkpoint_io import load_pretrained, save_pretrained, write_digests
from tests.bmojo.model_family import build, random_tokens, small_config


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


def test_a_disk_that_does_not_take_the_weights_is_said_with_number_and_file(tmp_path):
    """A limit on the size of files stands for the disk."""
    code = (
        "import resource, sys; from pathlib import Path; import torch; from bmojo.tensor_file import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "try: save_tensors({'x': torch.zeros(100_000)}, Path(sys.argv[1]))\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    file = tmp_path / "x.safetensors"
    ended = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert ended.stdout == f"{errno.EFBIG} {file}\n", ended.stderr
