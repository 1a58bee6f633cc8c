"""Which tokenizers give every text back: decode(encode(x)) == x for all x, and no x gives a special token's id.

First by its parts: each kind that is accepted keeps every byte, and what is not known to is refused. Then by probes,
which are no proof but meet what the parts do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Regex
from tokenizers import pre_tokenizers as pre

from data.errors import DataError

# Pre-tokenizers that cut and no more. UnicodeScripts is none: it drops leading characters that belong to no script.
_KEEPING = {"ByteLevel", "Split", "Digits", "Punctuation", "FixedLength"}
_ADDING_NOTHING = {
    "ByteLevel",
    "BertProcessing",
    "RobertaProcessing",
}  # post-processors, unless asked for special tokens
_PROBED_ADDED_TOKENS = 200
_SHOWN_BYTES = 40


def byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if printable, else the next free character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pre_tokenizers_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a tokenizer's pre-tokenizer in order, nested sequences opened."""
    return list(_flat(spec.get("pre_tokenizer"), "pretokenizers"))


def check_parts(spec: dict[str, Any], name: str) -> None:
    """Check a tokenizer.json part by part. Raises DataError: some text would not come back from it."""
    problem = next(_problems(spec), None)
    if problem:
        raise DataError(
            f"{name}: {problem}. Expected a byte-level BPE that gives every text back byte for byte (as GPT-2's): bits "
            "per byte, splits and documents rest on it. Load another tokenizer, or train one: set `source` instead of "
            "`load`."
        )


def check_probes(spec: dict[str, Any], encode: Callable[[list[str]], list[Any]], decode: Any, name: str) -> None:
    """Encode and decode texts that tokenizers are known to stumble over. Raises DataError: one did not come back."""
    texts = list(_probes(spec))
    for text, ids in zip(texts, encode(texts), strict=True):
        found, expected = decode(ids), text.encode()
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
            start = max(at - _SHOWN_BYTES // 2, 0)
            raise DataError(
                f"{name}: text does not come back from it: {expected[start : start + _SHOWN_BYTES]!r} came back as "
                f"{found[start : start + _SHOWN_BYTES]!r}. Expected the same bytes. Load another tokenizer, or train "
                "one: set `source` instead of `load`."
            )


def check_name_is_no_text(name: str, pattern: str) -> None:
    """Refuse an end-of-document token that merges could spell, before anything is learnt from text.

    Merges stay inside the pieces that `pattern` cuts text into, and their tokens consist of stand-ins for bytes. So a
    name with another character, or one whose text is always cut, cannot be the result of a merge.
    Raises: DataError.
    """
    stand_ins = byte_of_char()
    if any(char not in stand_ins for char in name):
        return
    text = bytes(stand_ins[char] for char in name).decode("utf-8", "replace")
    pieces = pre.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    if len(pieces) <= 1 or "\ufffd" in text:
        raise DataError(
            f"end_of_document={name!r}: ordinary text can be merged into a token of this name, which would end a "
            "document in the middle. Choose a name that text is cut inside of, such as '<|endoftext|>' or '</s>'."
        )


def _problems(spec: Any) -> Iterator[str]:
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict):
        yield "it holds no model of a tokenizer"
        return
    type_ = model.get("type", "BPE")  # older files, GPT-2's among them, do not name it
    if type_ != "BPE":
        yield f"its model is {type_}"
        return
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        yield "its model has no vocabulary with merges"
        return
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            yield f"its model adds {model[field]!r} to parts of words ({field})"
    if model.get("dropout"):
        yield "it drops merges at random (dropout)"
    if model.get("byte_fallback"):
        yield "it spells unknown bytes as <0xNN> (byte_fallback)"
    for stage in _flat(spec.get("normalizer"), "normalizers"):
        yield f"its normalizer ({stage['type']}) changes the text"
    stages = pre_tokenizers_of(spec)
    for stage in stages:
        if stage["type"] not in _KEEPING:
            yield f"its pre-tokenizer {stage['type']} does not keep every character"
        elif stage.get("behavior") == "Removed":
            yield f"its pre-tokenizer {stage['type']} removes what it splits at"
        elif stage.get("add_prefix_space"):
            yield "it puts a blank before every text (add_prefix_space)"
    byte_level = [stage for stage in stages if stage["type"] == "ByteLevel"]
    if len(byte_level) != 1:
        yield f"it has {len(byte_level)} byte-level pre-tokenizers, and needs exactly one"
    yield from _problems_of_what_follows(spec)
    yield from _problems_of_ids(spec)
    yield from _problems_of_added_tokens(spec)


def _problems_of_what_follows(spec: dict[str, Any]) -> Iterator[str]:
    """Post-processors, which may repeat or drop the text even if no special token is asked for, and decoders."""
    for stage in _flat(spec.get("post_processor"), "processors"):
        if stage["type"] == "TemplateProcessing":
            texts = [piece["Sequence"]["id"] for piece in stage["single"] if "Sequence" in piece]
            if texts != ["A"]:
                yield f"its post-processor's template makes {' + '.join(texts) or 'nothing'} of a text A"
        elif stage["type"] not in _ADDING_NOTHING:
            yield f"its post-processor {stage['type']} is not known to keep every token"
    decoder = spec.get("decoder")
    if decoder is None:
        return
    decoders = [stage["type"] for stage in _flat(decoder, "decoders")]
    other = next((kind for kind in decoders if kind != "ByteLevel"), None)
    if other:
        yield f"its decoder {other} is not the reverse of byte-level encoding"
    elif len(decoders) != 1:
        yield f"it has {len(decoders)} byte-level decoders, and needs exactly one"


def _problems_of_ids(spec: dict[str, Any]) -> Iterator[str]:
    """Each id stands for one token, each byte has one, and not most ids are unused."""
    vocab: dict[str, int] = spec["model"]["vocab"]
    missing = sum(char not in vocab for char in byte_of_char())
    if missing:
        yield f"{missing} of the 256 bytes are not in its vocabulary, so not every text can be encoded"
    token_of: dict[int, str] = {}
    pairs = [*vocab.items(), *((token["content"], token["id"]) for token in spec.get("added_tokens", []))]
    for token, index in pairs:
        if token_of.setdefault(index, token) != token:
            yield f"its tokens {token_of[index]!r} and {token!r} share id {index}"
            return
    if max(token_of) >= 2 * len(token_of):
        yield f"its ids go up to {max(token_of)}, but it has only {len(token_of)} tokens"


def _problems_of_added_tokens(spec: dict[str, Any]) -> Iterator[str]:
    model, stand_ins = spec["model"], byte_of_char()
    merges = {pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair) for pair in model["merges"]}
    for token in spec.get("added_tokens", []):
        content = token["content"]
        in_bytes = all(char in stand_ins for char in content)
        can_be_text = in_bytes and content in model["vocab"]
        can_be_text = can_be_text and (len(content) == 1 or content in merges or model.get("ignore_merges", False))
        if not content:
            yield f"its added token {token['id']} is empty"
        elif token["special"] and can_be_text:
            yield f"ordinary text can be merged into its special token {content!r} (id {token['id']})"
        elif not token["special"] and (token.get("lstrip") or token.get("rstrip")):
            yield f"its added token {content!r} swallows the blanks beside it (lstrip, rstrip)"
        elif not token["special"] and in_bytes and bytes(stand_ins[char] for char in content) != content.encode():
            yield f"its added token {content!r} (id {token['id']}) is also how byte-level decoding spells other text"


def _probes(spec: dict[str, Any]) -> Iterator[str]:
    yield "".join(chr(code) for code in range(0x250))
    yield "\u07ff\u0800\u0fff\u1000\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff"  # ends of the UTF-8 lengths
    yield from (char for code in range(0x100) if (char := chr(code)))
    for blank in (" ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u2003", "\u2028", "\u3000", "\x0b", "\x00"):
        for count in (1, 2, 3, 5, 64, 65, 200):
            yield blank * count
            yield f"a{blank * count}b{blank * count}"
    yield "one  two\tthree\n\n four, five-six 123 1234567 don't DON'T we'll ... ??? ## -- __ e\u0301 \u0663 \ufeff"
    yield "\u4e2d\u6587 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u05d0\u05d1 \u0e01\u0e33 \uff21\uff22 \ufb01"
    for token in spec["added_tokens"][:_PROBED_ADDED_TOKENS]:
        content = token["content"]
        yield from (content, content * 3, f" {content} ", f"a{content}b", f"\n\n{content}\t{content}  {content}\n")
        yield from (content[:-1], content[1:], content.upper(), content.lower(), f"  {content}.{content}  x")
        yield "".join(chr(byte_of_char()[char]) for char in content if char in byte_of_char())


def _flat(stage: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if stage is None:
        return
    if stage["type"] == "Sequence":
        for inner in stage[key]:
            yield from _flat(inner, key)
    else:
        yield stage
