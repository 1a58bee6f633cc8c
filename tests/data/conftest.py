"""A tokenizer and shards that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.config import FilesSource, PythonStdlibSource, TokenizeFields, TokenizerFields
from data.sampling import sample_texts
from data.tokenizer import Tokenizer, train_tokenizer
from tests.data.here import tokenize_here


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small tokenizer trained on a little of the standard library."""
    source = PythonStdlibSource(kind="python_stdlib")
    fields = TokenizerFields(source=source, vocab_size=600, sample_bytes=1 << 18)
    return train_tokenizer(sample_texts(source, fields.sample_bytes), fields)


def _shards(tokenizer: Tokenizer, folder: Path, seed: int) -> Path:
    path = folder / "corpus.jsonl"
    rng = np.random.default_rng(seed)
    texts = [" ".join(map(str, rng.integers(0, 10**6, rng.integers(1, 8)))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = TokenizeFields(
        source=FilesSource(kind="files", paths=(str(path),)),
        seq_len=16,
        slice_bytes=4096,
        shard_bytes=4096,
        validation_fraction=0,
    )
    tokenize_here(tokenizer, fields, folder)
    return folder


@pytest.fixture(scope="package")
def shards_16(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred samples of 16 tokens in several slices and shards."""
    return _shards(tokenizer, tmp_path_factory.mktemp("shards"), seed=0)


@pytest.fixture(scope="package")
def other_shards_16(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another text."""
    return _shards(tokenizer, tmp_path_factory.mktemp("shards"), seed=1)
