"""A compressed file in pieces gives every document once, in order, and as the whole does."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.sources import Document, compressed, jsonl, plan_slices, read_slice
from tests.data.corpora import files

SKIPPABLE = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed, "_LEAST_BYTES", 1)
        patch.setattr(compressed, "_PIECES", {"jsonl.gz": 1000, "jsonl.zst": 1000})
        patch.setattr(compressed, "_BLOCK_BYTES", 50)
        yield


def gz(pieces: list[bytes]) -> bytes:
    """A member per piece."""
    return b"".join(gzip.compress(piece, mtime=0) for piece in pieces)


def zst(pieces: list[bytes], sized: bool = True, between: bytes = b"") -> bytes:
    """A frame per piece. Args: sized: the frames tell how much text they hold."""
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=sized)
    frames = []
    for piece in pieces:
        if sized:
            frames.append(compressor.compress(piece))
        else:
            stream = compressor.compressobj()
            frames.append(stream.compress(piece) + stream.flush())
    return between.join([b"", *frames])


def seekable(pieces: list[bytes], has_checksums: bool = False) -> bytes:
    """Frames that do not tell how much text they hold, and a table that does."""
    frames = [zst([piece], sized=False) for piece in pieces]
    table = b"".join(
        struct.pack("<II", len(frame), len(piece)) + b"sums" * has_checksums
        for frame, piece in zip(frames, pieces, strict=True)
    )
    table += struct.pack("<IBI", len(frames), 0x80 * has_checksums, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


FORMATS = {
    "seekable.zst": seekable,
    "summed.zst": lambda pieces: seekable(pieces, has_checksums=True),
    "gz": gz,
    "zst": zst,
    "unsized.zst": lambda pieces: zst(pieces, sized=False),
    "skipping.zst": lambda pieces: zst(pieces, between=SKIPPABLE),
}


def cut(data: bytes, places: list[float]) -> list[bytes]:
    """Anywhere, also inside lines and into empty pieces."""
    ends = sorted(int(place * len(data)) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


def documents(path: Path, slice_bytes: int) -> list[Document]:
    found = [document for slice_ in plan_slices(files(path), slice_bytes) for document in read_slice(slice_)]
    assert all(isinstance(document, Document) for document in found)
    return found  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=25),
    places=st.lists(st.floats(0, 1), max_size=6),
    slice_bytes=st.integers(1, 500),
    form=st.sampled_from(sorted(FORMATS)),
    ends_with_newline=st.booleans(),
)
def test_pieces_of_any_size_give_what_the_plain_file_gives(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    places: list[float],
    slice_bytes: int,
    form: str,
    ends_with_newline: bool,
) -> None:
    folder = tmp_path_factory.mktemp("compressed")
    data = "\n".join(json.dumps({"text": line + "."}) for line in lines).encode() + b"\n" * ends_with_newline
    (folder / "c.jsonl").write_bytes(data)
    path = folder / f"c.jsonl.{form.rpartition('.')[2]}"
    path.write_bytes(FORMATS[form](cut(data, places)))
    plain = [(found.text, found.start, found.end) for found in documents(folder / "c.jsonl", 1 << 20)]
    found = documents(path, slice_bytes)
    assert [(one.text, one.start, one.end) for one in found] == plain
    assert [one.id for one in found] == [f"{path}:{start}" for _, start, _ in plain]


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_a_file_is_cut_into_pieces_of_about_the_size_asked_for(tmp_path: Path, form: str) -> None:
    data = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(2000))
    path = tmp_path / f"c.jsonl.{form}"
    path.write_bytes(FORMATS[form](cut(data, [0.25, 0.5, 0.75]) if form == "zst" else [data]))
    slices = plan_slices(files(path), 4000)
    assert len(slices) == -(-len(data) // 4000)
    assert sum(slice_.num_bytes for slice_ in slices) == len(data)
    of_slice = [len(list(read_slice(slice_))) for slice_ in slices]
    assert max(of_slice[:-1]) - min(of_slice[:-1]) < 30


@pytest.mark.parametrize("form", ["zst", "seekable.zst", "summed.zst"])
def test_a_frame_is_entered_without_reading_those_before(tmp_path: Path, form: str) -> None:
    frames = [json.dumps({"text": letter + Random(0).randbytes(1500).hex()}).encode() + b"\n" for letter in "abcd"]
    first = len(FORMATS["zst" if form == "zst" else "unsized.zst"](frames[:1]))
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(FORMATS[form](frames))
    slices = plan_slices(files(path), len(frames[0]))
    assert len(slices) == 4
    damaged = bytearray(path.read_bytes())
    damaged[first - 6] ^= 0xFF  # in the first frame, whose checksum it is behind
    path.write_bytes(damaged)
    assert [document.text[0] for slice_ in slices[2:] for document in read_slice(slice_)] == ["c", "d"]
    with pytest.raises(DataError, match=r"the compressed stream is .*zstd -t"):
        list(read_slice(slices[0]))


@pytest.mark.parametrize("change", [lambda raw: raw[:-3] + b"abc", lambda raw: b"\0" + raw])
def test_a_table_that_does_not_fit_the_file_is_not_believed(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(change(seekable([b"{}\n" * 100] * 3)))
    assert compressed._seek_table(path, path.stat().st_size) is None


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_a_file_of_less_than_two_pieces_that_cannot_be_entered_is_not_cut(tmp_path: Path, form: str) -> None:
    data = b"".join(json.dumps({"text": Random(i).randbytes(50).hex()}).encode() + b"\n" for i in range(100))
    path = tmp_path / f"c.jsonl.{form}"
    path.write_bytes(FORMATS[form]([data]))
    assert len(plan_slices(files(path), len(data) // 2 + 1)) == 1
    assert len(plan_slices(files(path), len(data) // 2 - 1)) == 3


def test_in_a_store_a_file_is_cut_at_the_frames_of_its_table_or_not_at_all(tmp_path: Path) -> None:
    data = [json.dumps({"text": f"{i} " + Random(i).randbytes(500).hex()}).encode() + b"\n" for i in range(8)]
    store = fsspec.filesystem("memory")
    for form, num_slices in (("seekable.zst", 8), ("zst", 1), ("gz", 1)):
        name = f"c.jsonl.{form.rpartition('.')[2]}"
        store.pipe(f"/compressed/{name}", FORMATS[form](data))
        source = files(f"memory://compressed/{name}")
        slices = plan_slices(source, len(data[0]) + 1)
        assert len(slices) == num_slices
        texts = [
            document.text for slice_ in slices for document in read_slice(slice_) if isinstance(document, Document)
        ]
        assert texts == [json.loads(line)["text"] for line in data]


def test_few_pieces_are_cut_of_what_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_PIECES", {"jsonl.gz": 4, "jsonl.zst": 8})
    data = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(2000))
    for form, num_pieces in (("gz", 4), ("zst", 8), ("unsized.zst", 8)):
        path = tmp_path / f"{num_pieces}{len(form)}.jsonl.{form.rpartition('.')[2]}"
        path.write_bytes(FORMATS[form]([data]))
        assert len(plan_slices(files(path), 100)) == num_pieces
        assert len(documents(path, 100)) == 2000


@pytest.mark.parametrize("invalid_utf8", ["error", "replace", "skip_document"])
@pytest.mark.parametrize("form", ["plain", "gz"])
def test_lines_are_counted_for_messages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, invalid_utf8: str
) -> None:
    """Counting reads the file from its beginning: for each document it would take the square of the file's size."""
    monkeypatch.setattr(jsonl._Place, "__str__", lambda place: pytest.fail("lines were counted"))
    bad = b'{"text": "\xff"}\n{"text": "\\ud800"}\n' if invalid_utf8 != "error" else b""
    path = tmp_path / ("c.jsonl" if form == "plain" else "c.jsonl.gz")
    path.write_bytes((gz if form == "gz" else b"".join)([b'{"text": "one"}\n', bad, b'{"text": "two"}\n']))
    slices = plan_slices(files(path, invalid_utf8=invalid_utf8), 1 << 20)
    texts = [document.text for document in read_slice(slices[0]) if isinstance(document, Document)]
    assert texts == (["one", "\ufffd", "\ufffd", "two"] if invalid_utf8 == "replace" else ["one", "two"])


def test_damage_in_a_later_piece_is_told_with_its_place_and_bad_lines_with_their_number(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(2000))
    path = tmp_path / "c.jsonl.gz"
    whole = gz([data])
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2))
    with pytest.raises(DataError, match=r"damaged or cut off after (byte [\d,]+ of its text|line \d+)"):
        documents(path, 4000)
    bad = data.replace(b'{"text": "line 1500"}', b'{"text": 1}')
    path.write_bytes(gz([bad]))
    with pytest.raises(DataError, match=r"c.jsonl.gz, line 1501: field 'text' is a JSON number"):
        documents(path, 4000)
