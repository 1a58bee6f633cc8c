"""Tokenizer: bytes round-trip, and both encoders give the same ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from data import tokenizer as tokenizer_module
from data.config import PythonStdlibSource, TokenizerFields
from data.errors import DataError
from data.sampling import sample_texts
from data.tokenizer import PATTERN, Tokenizer, load_tokenizer, train_tokenizer

STDLIB = PythonStdlibSource(kind="python_stdlib")
FIELDS = TokenizerFields(source=STDLIB, vocab_size=2048, sample_bytes=1 << 20)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
CODE_LIKE = st.text(
    st.sampled_from("  \t\n\r'_=(),.:abcdefs0123456789\u00e9\u0301\u4e2d\u0663\u00a0\u2003"), max_size=200
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(sample_texts(STDLIB, FIELDS.sample_bytes), FIELDS)


def assert_round_trip(tokenizer: Tokenizer, text: str) -> None:
    fast, slow = tokenizer.encode_batch([text])[0], tokenizer._encode_batch_tokenizers([text])[0]
    np.testing.assert_array_equal(fast, slow)
    assert tokenizer.decode(fast) == text.encode()
    assert tokenizer.token_num_bytes[fast].sum() == len(text.encode())
    assert tokenizer.eod_id not in fast


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_round_trips_with_the_same_ids_from_both_encoders(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.backend == "tiktoken"
    assert_round_trip(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=CODE_LIKE)
def test_code_like_text_round_trips_with_the_same_ids_from_both_encoders(tokenizer: Tokenizer, text: str) -> None:
    assert_round_trip(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | CODE_LIKE | st.text(st.sampled_from("ab1_ \n\r\t.'s\u00e9\u0301\u2003\x1c"), max_size=200))
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    (whole,) = tokenizer.encode_batch([text])
    for size in (1, 3, 10):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_module, "_PIECE_CHARS", size)
            pieces = list(tokenizer_module._pieces(text))
            assert "".join(pieces) == text
            np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], whole)


def test_a_long_text_is_encoded_in_pieces() -> None:
    text = "some words " * 400_000
    assert [len(piece) >> 20 for piece in tokenizer_module._pieces(text)] == [1, 1, 1, 1, 0]
    assert list(tokenizer_module._pieces("x" * (3 << 20))) == ["x" * (3 << 20)]


def test_real_text_round_trips_with_the_same_ids_from_both_encoders(tokenizer: Tokenizer) -> None:
    for text in sample_texts(STDLIB, 1 << 19):
        assert_round_trip(tokenizer, text)


def test_both_encoders_put_every_character_into_the_same_class(tokenizer: Tokenizer) -> None:
    # Beside a letter, a digit and a blank, a character of another class is split off in another place.
    characters = [chr(code) for code in range(1, sys.maxunicode + 1, 23) if not 0xD800 <= code < 0xE000]
    characters += [chr(code) for code in range(1, 0x3000)]
    text = "".join(f"a{c}{c}e 1{c}1 {c} " for c in characters)
    assert_round_trip(tokenizer, text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "=-", "ab c\t"])
def test_a_huge_document_without_breaks_takes_linear_time(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text.encode()


def test_a_special_token_written_in_a_text_is_only_text(tokenizer: Tokenizer) -> None:
    assert_round_trip(tokenizer, "a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eod_id]) == b""
    assert tokenizer.token_num_bytes[tokenizer.eod_id] == 0


def test_training_and_storing_are_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(sample_texts(STDLIB, FIELDS.sample_bytes), FIELDS)
    assert again.sha256 == tokenizer.sha256
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert (loaded.sha256, loaded.backend, loaded.vocab_size, loaded.eod_id) == (
        tokenizer.sha256,
        "tiktoken",
        tokenizer.vocab_size,
        tokenizer.eod_id,
    )
    np.testing.assert_array_equal(loaded.encode_batch(["def f():"])[0], tokenizer.encode_batch(["def f():"])[0])


def test_a_stored_tokenizer_is_read_by_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eod_id
    assert theirs("def f(): return 1")["input_ids"] == tokenizer.encode_batch(["def f(): return 1"])[0].tolist()


def test_few_texts_give_fewer_ids_and_still_every_byte() -> None:
    small = train_tokenizer(["abab"], FIELDS)
    assert 257 <= small.vocab_size < 300
    assert_round_trip(small, "\x00 other \U0001f600")


def test_a_sample_takes_the_same_share_from_everywhere() -> None:
    texts = list(sample_texts(STDLIB, 3 << 20))
    total = sum(len(text.encode()) for text in texts)
    assert 0.8 * (3 << 20) < total < 1.2 * (3 << 20)
    assert len(texts) > 100


def test_a_tokenizer_in_the_home_of_nobody() -> None:
    with pytest.raises(DataError, match="~no-such-user/tok: no such user"):
        load_tokenizer("~no-such-user/tok")


def test_no_text_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="empty corpus"):
        train_tokenizer(["", ""], FIELDS)


def gpt2_like(**byte_level: bool) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **byte_level})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model.train_from_iterator(["the cat the dog " * 50], trainer)
    return model


def test_another_byte_level_tokenizer_can_be_loaded_and_keeps_its_own_encoder(tmp_path: Path) -> None:
    gpt2_like().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")
    assert loaded.backend == "tokenizers"
    ids = loaded.encode_batch(["the <|endoftext|>\n\u00e9"])[0]
    assert loaded.decode(ids) == "the <|endoftext|>\n\u00e9".encode()
    assert loaded.eod_id not in ids


def test_merges_that_tiktoken_would_order_otherwise_keep_the_slow_encoder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = spec["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend == "tokenizers"
    text = "import os\n\nclass A:\n    pass\n"
    assert loaded.decode(loaded.encode_batch([text])[0]) == text.encode()


class TestUnfitTokenizers:
    """A tokenizer that does not keep every byte is refused."""

    def test_a_blank_before_every_text(self) -> None:
        with pytest.raises(DataError, match="add_prefix_space"):
            Tokenizer(gpt2_like(add_prefix_space=True), "<|endoftext|>")

    def test_a_normalizer(self) -> None:
        model = gpt2_like()
        model.normalizer = normalizers.NFC()
        with pytest.raises(DataError, match=r"normalizer \(NFC\) changes the text"):
            Tokenizer(model, "<|endoftext|>")

    def test_another_model(self) -> None:
        with pytest.raises(DataError, match="its model is WordLevel"):
            Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "<|endoftext|>")

    def test_no_end_of_document_token(self) -> None:
        with pytest.raises(DataError, match=r"no special token '</s>'; its special tokens are '<\|endoftext\|>'"):
            Tokenizer(gpt2_like(), "</s>")

    def test_missing_or_damaged_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no such file"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(DataError, match="cannot be read as a tokenizer"):
            load_tokenizer(tmp_path, "<|endoftext|>")


def test_the_pattern_matches_every_character() -> None:
    import regex

    text = "".join(map(chr, [*range(0x3000), *range(0x1F600, 0x1F700)]))
    assert "".join(regex.findall(PATTERN, text)) == text
