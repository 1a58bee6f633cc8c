"""A tokenizer that the tests of packing and streaming share."""

from __future__ import annotations

import pytest

from data.config import PythonStdlibSource, TokenizerFields
from data.sampling import sample_texts
from data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small tokenizer trained on a little of the standard library."""
    source = PythonStdlibSource(kind="python_stdlib")
    fields = TokenizerFields(source=source, vocab_size=600, sample_bytes=1 << 18)
    return train_tokenizer(sample_texts(source, fields.sample_bytes), fields)
