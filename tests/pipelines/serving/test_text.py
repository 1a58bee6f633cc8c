"""Text of tokens as they come, and the stops in it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipelines.serving.text import TextStream

LETTERS = st.text("ab\né", max_size=12)
STOPS = st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[first:last] for first, last in pairwise(places)]


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=8))
def test_pieces_of_any_size_give_the_text_up_to_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    stream, shown = TextStream(stops), []
    for piece in pieces_of(text.encode(), cuts):
        shown.append(stream.push(piece))
        assert cut(text, stops).startswith("".join(shown))  # nothing that a stop takes back
        assert stream.num_shown == len("".join(shown))
    shown.append(stream.close())
    assert "".join(shown) == cut(text, stops)
    assert stream.is_stopped == (cut(text, stops) != text)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    stream = TextStream(["\nUser:"])
    assert [stream.push(piece) for piece in (b"Hi", b"\n", b"Us", b"ers", b"\nUser", b": x")] == [
        "Hi", "", "", "\nUsers", "", "",
    ]  # fmt: skip
    assert stream.is_stopped
    assert stream.close() == ""


def test_bytes_that_are_no_text_show_as_replacement_characters() -> None:
    stream = TextStream()
    assert [stream.push(piece) for piece in (b"\xc3", b"\xa9", b"\xff", b"\xe2\x82")] == ["", "é", "�", ""]
    assert stream.close() == "�"
