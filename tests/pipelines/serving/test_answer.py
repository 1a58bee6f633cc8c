"""One answer: its text, its tokens, and what of it is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import byte_tokenizer
from pipelines.serving.answer import Answer
from pipelines.serving.job import Drawing, DrawnToken
from tests.pipelines.serving.engines import TOKENIZER
from tests.pipelines.serving.test_text import cut

TEXTS = st.lists(st.sampled_from(["def", " function", "é", "☕", "\n", " return", "4", "9", "x", "�"]), max_size=14)
BYTES = byte_tokenizer()


def drawn(answer: Answer, ids: list[int]) -> tuple[str, list[DrawnToken]]:
    """Text and tokens that an answer tells when it is given ids, until it ends."""
    text, tokens = "", []
    for index in ids:
        told = answer.add(index, None)
        text, tokens = text + told.text, tokens + list(told.tokens)
        if answer.reason is not None:
            break
    return text, tokens


@given(
    parts=TEXTS, stops=st.lists(st.sampled_from(["é", "☕", "49", "\n r", "xx", "n4"]), max_size=2), by=st.booleans()
)
def test_what_is_kept_stands_for_the_text(parts: list[str], stops: list[str], by: bool) -> None:
    tokenizer = BYTES if by else TOKENIZER
    ids = tokenizer.encode_batch(["".join(parts)])[0].tolist()
    answer = Answer(0, Drawing(len(ids) + 1, stops=tuple(stops)), tokenizer, torch.device("cpu"))
    text, tokens = drawn(answer, [*ids, tokenizer.eod_id])
    assert text == cut("".join(parts), stops)
    assert answer.reason == "stop"
    assert tokenizer.decode(answer.tokens_of_text()).decode() == text
    assert [token.id for token in tokens] == ids[: len(tokens)]
    assert all(token.start < len(text) for token in tokens)
    assert tokenizer.decode(token.id for token in tokens).decode("utf-8", "ignore").startswith(text)


def test_a_token_is_told_once_all_its_text_is() -> None:
    answer = Answer(0, Drawing(9, stops=("49",)), BYTES, torch.device("cpu"))
    told = [answer.add(ord(char), None) for char in "a4b4"]
    assert [(one.text, [chr(token.id) for token in one.tokens]) for one in told] == [
        ("a", ["a"]), ("", []), ("4b", ["4", "b"]), ("", []),
    ]  # fmt: skip
    assert answer.end("stop").text == "4"


def test_the_last_token_brings_what_was_held_back() -> None:
    answer = Answer(0, Drawing(2, stops=("49",)), BYTES, torch.device("cpu"))
    assert drawn(answer, [ord("a"), ord("4")])[0] == "a4"
    assert answer.reason == "length"
    assert answer.num_tokens == 2


def test_the_end_of_the_document_is_no_token_of_the_answer() -> None:
    answer = Answer(0, Drawing(9), BYTES, torch.device("cpu"))
    assert drawn(answer, [ord("a"), BYTES.eod_id])[0] == "a"
    assert (answer.reason, answer.num_tokens, answer.tokens_of_text()) == ("stop", 1, [ord("a")])
    on = Answer(0, Drawing(3, ignores_end=True), BYTES, torch.device("cpu"))
    assert drawn(on, [ord("a"), BYTES.eod_id, ord("b")])[0] == "ab"
    assert on.tokens_of_text() == [ord("a"), BYTES.eod_id, ord("b")]
