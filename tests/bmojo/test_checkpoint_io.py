"""A model on disk."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from base.errors import DamagedError
from bmojo.checkpoint_io import load_pretrained, save_pretrained, weight_files, weights_by_name, write_digests
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
    with pytest.raises(ValueError, match=r"weights do not fit config.json"):
        load_pretrained(tmp_path / "a")


@pytest.mark.ci
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


def test_large_weights_are_in_several_files_with_an_index_as_hugging_face_writes_it(tmp_path, monkeypatch):
    model = build(small_config(tie_embeddings=True), dtype=torch.float32)
    largest = max(value.nbytes for value in model.parameters())
    monkeypatch.setattr("bmojo.checkpoint_io.SHARD_BYTES", 2 * largest)
    save_pretrained(model, tmp_path)
    files = weight_files(tmp_path)
    assert len(files) >= 2
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.parameters())
    for file in files:
        tensors = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == tensors.keys()
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2 * largest
    read, loaded = weights_by_name(tmp_path), load_pretrained(tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)
        assert torch.equal(read(name), value)


def test_a_damaged_or_missing_file_of_several_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("bmojo.checkpoint_io.SHARD_BYTES", 40_000)
    save_pretrained(build(small_config()), tmp_path)
    name = weight_files(tmp_path)[1]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=f"{name} is damaged"):
        load_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        load_pretrained(tmp_path)
