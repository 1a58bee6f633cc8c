"""Byte-level BPE: trained and stored in the Hugging Face format, encoded by tiktoken where that gives the same ids.

Every byte is a token, so any text comes back exactly. Special tokens are never read out of text: "<|endoftext|>" in a
document is encoded as those 13 characters. Measured and argued in docs/design/0012-tokenizer-with-two-encoders.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import TokenizerFields
from data.errors import DataError
from data.lossless import byte_of_char, check_name_is_no_text, check_parts, check_probes, pre_tokenizers_of
from data.paths import expanded
from data.sources.document import reading

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"  # what transformers reads beside it; names the end-of-document token

_END_OF_DOCUMENT = "<|endoftext|>"  # of the tokenizer of bytes

# Contractions; a word with the one character before it; up to three digits; punctuation; white space, whose last blank
# goes to the next word. As GPT-4's, with marks counted as letters and every run bounded, so that no text makes the
# regular expression backtrack far or a pre-token long.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,64}"
    r"|\s{1,64}(?!\S)|\s{1,64}"
)


_PIECE_CHARS = 1 << 20
_CUT = re.compile(r"[^\W_](?=[ \n])")


class Tokenizer:
    """Text to token ids and back to bytes.

    Attributes:
        vocab_size: number of ids, the special ones included.
        eod_id: id of the end-of-document token.
        end_of_document: that token's name.
        token_num_bytes: int32 array; bytes of text each id stands for, 0 for special tokens.
        backend: what encodes: "tiktoken", or "tokenizers" where tiktoken would not surely give the same ids.
        sha256: digest of the stored tokenizer.
    """

    def __init__(self, model: tokenizers.Tokenizer, end_of_document: str, name: str = TOKENIZER_FILE) -> None:
        """Raises: DataError: `model` does not give every text back (data/lossless.py), or has no such special token."""
        self._model, self._name = model, name
        self._model.encode_special_tokens = True  # a special token's name in a text is only text
        self._model.no_truncation()
        self._model.no_padding()
        if model.decoder is None:
            model.decoder = decoders.ByteLevel()  # for those who read the stored file
        spec = json.loads(model.to_str())
        check_parts(spec, name)
        self.end_of_document = end_of_document
        self._bytes_of_id = _bytes_of_ids(model, spec, name)
        eod_id = model.token_to_id(end_of_document)
        special = [token["content"] for token in spec["added_tokens"] if token["special"]]
        if eod_id is None or end_of_document not in special:
            raise DataError(
                f"{name}: no special token {end_of_document!r}; its special tokens are "
                f"{', '.join(map(repr, special)) or 'none'}. Set end_of_document to one of them."
            )
        self.eod_id = int(eod_id)
        self.vocab_size = len(self._bytes_of_id)
        self.token_num_bytes = np.array([len(token) for token in self._bytes_of_id], np.int32)
        self._tiktoken = _same_in_tiktoken(spec)
        check_probes(spec, self.encode_batch, self.decode, name)

    @property
    def backend(self) -> str:
        """Name of the library that encodes."""
        return "tokenizers" if self._tiktoken is None else "tiktoken"

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before the first token of a document: the end-of-document token."""
        return (self.eod_id,)

    @cached_property
    def sha256(self) -> str:
        """Digest of what `save` stores."""
        return hashlib.sha256((self._model.to_str(pretty=True) + self.end_of_document).encode()).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """Smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without any special token. The texts must be encodable in UTF-8.

        Memory: tiktoken gets long texts in pieces, so it needs little beside the ids.
        """
        if self._tiktoken is not None:
            return [self._encode_tiktoken(self._tiktoken, text) for text in texts]
        return self._encode_batch_tokenizers(texts)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes the ids stand for; special tokens stand for none. They need not end at the end of a character."""
        return b"".join(self._bytes_of_id[token] for token in ids)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._model.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.end_of_document,
            "eos_token": self.end_of_document,
            "clean_up_tokenization_spaces": False,
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _encode_tiktoken(self, encoding: tiktoken.Encoding, text: str) -> np.ndarray:
        pieces = [encoding.encode_to_numpy(piece).astype(self.dtype) for piece in _pieces(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _encode_batch_tokenizers(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise DataError(
                f"{self._name}: the tokenizer gave up on a text: {error}. A regular expression of its pre-tokenizer "
                "tries too many ways. Load another tokenizer, or train one: set `source` instead of `load`."
            ) from error
        return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]


def train_tokenizer(documents: Iterable[str], fields: TokenizerFields) -> Tokenizer:
    """Learn merges from texts. The same texts give the same tokenizer.

    Raises: DataError: there is no text, or text could be merged into the end-of-document token.
    """
    check_name_is_no_text(fields.end_of_document, PATTERN)
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=fields.vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[fields.end_of_document],
        show_progress=False,
    )
    counted = _Counted(documents)
    model.train_from_iterator(counted, trainer)
    if not counted.num_chars:
        raise DataError("source: empty corpus: no document holds any text. Name files with text in them.")
    return Tokenizer(model, fields.end_of_document)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose ids are the bytes themselves, 0 to 255; 256 ends a document."""
    model = tokenizers.Tokenizer(models.BPE(vocab=byte_of_char(), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([_END_OF_DOCUMENT])
    return Tokenizer(model, _END_OF_DOCUMENT, "bytes")


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Read a tokenizer from its folder or tokenizer.json.

    Args:
        end_of_document: the special token between documents; None takes what `Tokenizer.save` noted.
    Raises: DataError: nothing there, damaged, or not a byte-level BPE.
    """
    path = expanded(path)
    file = path / TOKENIZER_FILE if os.path.isdir(path) else path  # other than Path's, false also if it is forbidden
    if not os.path.isfile(file):
        raise DataError(
            f"{file}: there is no such file, or not for you. Expected a tokenizer.json of Hugging Face tokenizers."
        )
    try:
        with reading(file):
            text = file.read_text(encoding="utf-8")
        check_parts(json.loads(text), str(file))  # first: the library panics at some of what is refused
        model = tokenizers.Tokenizer.from_str(text)
        if end_of_document is None:
            config_file = file.parent / _CONFIG_FILE
            with reading(config_file):
                end_of_document = str(json.loads(config_file.read_text(encoding="utf-8"))["eos_token"])
        return Tokenizer(model, end_of_document, str(file))
    except (DataError, OSError):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exceptions
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise DataError(f"{file}: cannot be read as a tokenizer: {error}. Train or copy it again.") from error


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of about _PIECE_CHARS, which together give the ids of the whole.

    They are cut where PATTERN cuts anyway: between a letter or digit and a blank or line end. None of its alternatives
    has white space behind anything else, so one always ends there. None looks back, so the next piece is matched as in
    the whole. Only white space looks at what follows it, and no piece but the last ends with it.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS and (found := _CUT.search(text, start + _PIECE_CHARS)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _is_panic(error: BaseException) -> bool:
    """Whether the Rust code of `tokenizers` panicked; what it raises then is no Exception."""
    return type(error).__name__ == "PanicException"


class _Counted:
    """Hands texts on to the trainer and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num_chars += len(text)
            yield text


def _bytes_of_ids(model: tokenizers.Tokenizer, spec: dict[str, Any], name: str) -> list[bytes]:
    stand_ins = byte_of_char()
    added = {token["id"]: b"" if token["special"] else token["content"].encode() for token in spec["added_tokens"]}
    vocab = model.get_vocab(with_added_tokens=True)
    of_id = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        try:
            of_id[index] = added[index] if index in added else bytes(stand_ins[char] for char in token)
        except KeyError:
            raise DataError(
                f"{name}: token {token!r} (id {index}) is not in byte-level characters. Expected a byte-level BPE."
            ) from None
    return of_id


def _same_in_tiktoken(spec: dict[str, Any]) -> tiktoken.Encoding | None:
    """A tiktoken encoding with the same ids for every text, or None where that is not certain.

    tiktoken joins neighbours whenever their join is a token, the one with the smallest id first; `tokenizers` joins
    the pairs that are merges, in their order. Both come to the same if ids grow with the merges and each merged token,
    split into bytes and joined by the merges before its own, ends as the two halves of its merge.
    """
    model = spec["model"]
    split, *rest = pre_tokenizers_of(spec)
    plain_split = split.get("pattern") == {"Regex": PATTERN} and split["behavior"] == "Isolated" and not split["invert"]
    if not plain_split or [stage["type"] for stage in rest] != ["ByteLevel"] or rest[0]["use_regex"]:
        return None
    if any(not token["special"] for token in spec["added_tokens"]) or model["byte_fallback"] or model["ignore_merges"]:
        return None
    stand_ins = byte_of_char()
    special = {token["content"] for token in spec["added_tokens"]}
    ranks = {
        bytes(stand_ins[char] for char in token): index
        for token, index in model["vocab"].items()
        if token not in special
    }
    merges = [tuple(bytes(stand_ins[char] for char in half) for half in pair) for pair in model["merges"]]
    merged_ids = [ranks.get(left + right, -1) for left, right in merges]
    in_order = all(before < after for before, after in pairwise([-1, *merged_ids]))
    if not in_order or len(merges) + 256 != len(ranks) or not all(_joins_to(ranks, pair) for pair in merges):
        return None
    return tiktoken.Encoding("bmojo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def _joins_to(ranks: dict[bytes, int], pair: tuple[bytes, ...]) -> bool:
    """Whether the bytes of a merged token, joined by smaller ranks than its own, end as the pair."""
    whole = b"".join(pair)
    parts = [bytes([byte]) for byte in whole]
    while len(parts) > 2:
        rank, at = min((ranks.get(left + right, 1 << 62), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= ranks[whole]:
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts) == pair
