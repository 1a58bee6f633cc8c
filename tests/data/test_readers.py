"""Readers share their definitions, notice damage, and count what they leave out."""

from __future__ import annotations

import gzip
import os
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.errors import DataError
from data.sources import Part, content_identity, duplicate_files, plan_slices, read_slice
from data.sources import jsonl as jsonl_reader
from tests.data.corpora import TEXTS, files, jsonl, texts_of, without_privileges, write


class TestOneDefinitionForAllReaders:
    """What is a blank line, a byte-order mark, a text column and a format is the same wherever it comes from."""

    LINES = (b'{"text": "one"}', b'{"text": "two"}')

    @staticmethod
    def packed(name: str, raw: bytes) -> bytes:
        if name.lower().endswith(".gz"):
            return gzip.compress(raw)
        return zstandard.compress(raw) if name.lower().endswith(".zst") else raw

    @pytest.mark.parametrize(
        "name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.json", "c.json.gz", "C.JSON.ZST", "C.JsonL"]
    )
    @pytest.mark.parametrize(
        "raw",
        [
            b"%s\n\n%s\n\n", b"%s\r\n\r\n%s\r\n", b"\n%s\n%s", b"\n\n \t\n%s\n \n%s\n", b"\xef\xbb\xbf%s\n%s\n",
            b"\xef\xbb\xbf\n%s\n%s", b"\xef\xbb\xbf\r\n%s\r\n%s",
            b"\xef\xbb\xbf\xef\xbb\xbf%s\n%s\n", b"%s\n%s\n\xef\xbb\xbf\xef\xbb\xbf \n",
            b"%s\n\xef\xbb\xbf%s\n", b"\xef\xbb\xbf \n\xef\xbb\xbf%s\n%s",
        ],
    )  # fmt: skip
    def test_blank_lines_and_marks_in_json_lines(self, tmp_path: Path, name: str, raw: bytes) -> None:
        (tmp_path / name).write_bytes(self.packed(name, raw % self.LINES))
        assert texts_of(files(tmp_path / name)) == ["one", "two"]
        assert texts_of(files(tmp_path / name), slice_bytes=7) == ["one", "two"]

    @pytest.mark.parametrize(
        "arrow_type",
        [
            pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
            pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
            pa.dictionary(pa.int32(), pa.binary()),
        ],
        ids=str,
    )  # fmt: skip
    def test_text_columns(self, tmp_path: Path, arrow_type: pa.DataType) -> None:
        values = pa.array(["one", "zwei\u00e9", "one"])
        try:
            column = values.cast(arrow_type)
        except pa.ArrowNotImplementedError:
            column = values.cast(pa.binary()).dictionary_encode()
        pq.write_table(pa.table({"id": [1, 2, 3], "text": column}), tmp_path / "c.parquet")
        assert texts_of(files(tmp_path / "c.parquet")) == ["one", "zwei\u00e9", "one"]

    @pytest.mark.parametrize("values", [[1, 2], [1.5, 2.5], [["a"], ["b"]], [{"x": "a"}, {"x": "b"}], [True, False]])
    def test_columns_that_are_no_text(self, tmp_path: Path, values: list[Any]) -> None:
        pq.write_table(pa.table({"text": values}), tmp_path / "c.parquet")
        with pytest.raises(DataError, match=r"c.parquet: column 'text' has type .*, expected string"):
            texts_of(files(tmp_path / "c.parquet"))

    @pytest.mark.parametrize("order", [["a", "a.b"], ["a.b", "a"]])
    def test_a_dotted_column_beside_a_struct(self, tmp_path: Path, order: list[str]) -> None:
        columns = {"a": pa.array([{"b": "no"}, {"b": "never"}]), "a.b": pa.array(["one", "two"])}
        pq.write_table(pa.table({name: columns[name] for name in order}), tmp_path / "c.parquet", row_group_size=1)
        assert texts_of(files(tmp_path / "c.parquet", text_field="a.b")) == ["one", "two"]
        assert len(plan_slices(files(tmp_path / "c.parquet", text_field="a.b"), 1)) == 2

    def test_numbers_of_any_length_beside_the_text(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl").write_text(
            '{"id": ' + "7" * 50_000 + ', "text": "one"}\n{"id": -1e999, "text": "two"}\n'
        )
        assert texts_of(files(tmp_path / "c.jsonl")) == ["one", "two"]

    @pytest.mark.parametrize(
        ("name", "codec"), [("c.txt", "utf-16"), ("c.jsonl", "utf-16-le"), ("c.jsonl.gz", "utf-16-be")]
    )
    def test_utf16_is_called_that(self, tmp_path: Path, name: str, codec: str) -> None:
        mark = {"utf-16": "", "utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}[codec]
        (tmp_path / name).write_bytes(self.packed(name, (mark + '{"text": "one"}\n').encode(codec)))
        with pytest.raises(DataError, match=r"this is UTF-16 .* iconv -f UTF-16 -t UTF-8"):
            texts_of(files(tmp_path / name))

    def test_nul_characters_in_json_lines_point_to_utf16(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-16-le"))
        with pytest.raises(DataError, match=r"c.jsonl, line 1: not JSON .*iconv -f UTF-16LE"):
            texts_of(files(tmp_path / "c.jsonl"))

    @pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
    def test_a_file_that_may_not_be_read(self, name: str) -> None:
        """Planned before, as on a machine where one may."""
        with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
            Path(folder).chmod(0o755)
            path = write(Path(folder, name), ["one"])
            source = files(path)
            slices = plan_slices(source, 1 << 20)
            path.chmod(0)
            for action in (lambda: content_identity(source), lambda: list(read_slice(slices[0]))):
                with (
                    without_privileges(),
                    pytest.raises(DataError, match=rf"^{path}: cannot be read: Permission denied. Allow reading it"),
                ):
                    action()

    def test_a_folder_that_may_not_be_entered(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, "c.jsonl"), ["one"])
            Path(folder).chmod(0)
            with (
                without_privileges(),
                pytest.raises(
                    DataError, match=r"source.paths: .*c.jsonl: Permission denied. .* or allow entering its folders"
                ),
            ):
                content_identity(files(Path(folder, "c.jsonl")))


class TestDamage:
    @pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
    @pytest.mark.parametrize("checksums", [True, False])
    @pytest.mark.parametrize("dictionary", [True, False])
    def test_a_damaged_parquet_page_is_an_error(
        self, tmp_path: Path, compression: str, checksums: bool, dictionary: bool
    ) -> None:
        texts = [f"document {i} " + "some words " * 20 for i in range(400)]
        path = tmp_path / "c.parquet"
        pq.write_table(
            pa.table({"text": texts}), path,
            compression=compression, write_page_checksum=checksums, use_dictionary=dictionary,
        )  # fmt: skip
        raw = bytearray(path.read_bytes())
        middle = len(raw) // 3
        raw[middle : middle + min(3000, len(raw) // 4)] = bytes(min(3000, len(raw) // 4))
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"c.parquet: (damaged near row \d+|not a whole parquet file)"):
            texts_of(files(path))

    def test_what_is_no_gzip_file_is_called_that(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl.gz").write_bytes(jsonl(["one"]))
        with pytest.raises(
            DataError, match=r"c.jsonl.gz: the compressed stream is not gzip, or damaged at its beginning"
        ):
            texts_of(files(tmp_path / "c.jsonl.gz"))

    def test_a_flipped_byte_in_a_zstd_file_points_to_the_file(self, tmp_path: Path) -> None:
        raw = bytearray(
            zstandard.ZstdCompressor(write_checksum=True).compress(jsonl([f"text {i}" for i in range(999)]))
        )
        raw[len(raw) // 2] ^= 0xFF
        (tmp_path / "c.jsonl.zst").write_bytes(raw)
        with pytest.raises(DataError, match=r"c.jsonl.zst.*zstd -t"):
            texts_of(files(tmp_path / "c.jsonl.zst"))

    def test_a_fifo_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "c.jsonl")
        with pytest.raises(DataError, match=r"c.jsonl is not a regular file"):
            content_identity(files(tmp_path / "c.jsonl"))


class TestCounting:
    def test_text_files_without_text_are_counted_and_pieces_inside_a_line_are_not(self, tmp_path: Path) -> None:
        (tmp_path / "no-bytes.txt").touch()
        (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
        (tmp_path / "long-lines.txt").write_bytes((b"x" * 3000 + b"\n") * 5)
        source = files(tmp_path / "*.txt", max_txt_document_bytes=1024)
        left_out: Counter[str] = Counter()
        texts = [d.text for slice_ in plan_slices(source, 2048) for d in read_slice(slice_, left_out)]
        assert texts == ["x" * 3000 + "\n"] * 5
        assert left_out == {"empty": 2}

    def test_what_is_left_out_is_counted_by_reason(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800"}\n' + jsonl(["", "good", ""]))
        (tmp_path / "b.txt").write_bytes(b"caf\xe9")
        pq.write_table(pa.table({"text": pa.array([b"\xff", b"", b"good"])}), tmp_path / "c.parquet")
        left_out: Counter[str] = Counter()
        source = files(tmp_path / "*", invalid_utf8="skip_document")
        texts = [d.text for slice_ in plan_slices(source, 1 << 20) for d in read_slice(slice_, left_out)]
        assert texts == ["good", "good"]
        assert left_out == {"invalid_utf8": 4, "empty": 3}

    def test_a_file_that_several_names_lead_to_is_read_once(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", TEXTS)
        (tmp_path / "loop").symlink_to(tmp_path)
        (tmp_path / "b.jsonl").symlink_to("a.jsonl")
        os.link(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
        source = files(tmp_path / "**" / "*.jsonl", tmp_path / "a.jsonl")
        assert texts_of(source) == TEXTS
        names = duplicate_files(source)
        assert str(tmp_path / "b.jsonl") in names
        assert str(tmp_path / "c.jsonl") in names
        assert duplicate_files(files(tmp_path / "a.jsonl")) == []

    def test_planning_looks_at_each_part_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The size of the open slice is a running sum: no work per part grows with the number of parts."""
        parts = [Part(f"{i}", 0, 1, 1, 1) for i in range(50_000)]
        monkeypatch.setattr("data.sources.files.plan_parts", lambda source, slice_bytes: iter(parts))
        looked = Counter[str]()
        monkeypatch.setattr(
            Part, "__getattribute__", lambda self, name: looked.update([name]) or object.__getattribute__(self, name)
        )
        slices = plan_slices(files("x"), 1 << 20)
        assert len(slices) == 1
        assert looked["num_bytes"] <= 2 * len(parts)

    def test_a_long_line_is_not_held_by_slices_it_does_not_begin_in(self, tmp_path: Path) -> None:
        path = tmp_path / "c.jsonl"
        path.write_bytes(jsonl(["x" * 40_000_000, "short"]))
        source = files(path)
        _, *others = plan_slices(source, 1 << 20)
        tracemalloc.start()
        found = [document.text for slice_ in others for document in read_slice(slice_)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == ["short"]
        assert peak < 8_000_000


def test_lines_are_counted_only_for_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them the file is read from its start: once for each document that would be quadratic."""
    counted: list[str] = []
    of_place = jsonl_reader._Place.__str__
    monkeypatch.setattr(jsonl_reader._Place, "__str__", lambda place: counted.append(of_place(place)) or counted[-1])
    path = tmp_path / "c.jsonl"
    path.write_bytes(jsonl([*TEXTS, "bad"]).replace(b"bad", b"\xff"))
    assert texts_of(files(path, invalid_utf8="replace")) == [*TEXTS, "\ufffd"]
    assert not counted
    with pytest.raises(DataError, match=f"line {len(TEXTS) + 1}: invalid UTF-8"):
        texts_of(files(path))
    assert len(counted) == 1
