"""Sources: every format is read whole, slices cover each document once, and bad input is a clear error."""

from __future__ import annotations

import gzip
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from base.cache import cache_dir
from data.config import HuggingFaceSource, PythonStdlibSource, Source
from data.errors import DataError, SourceUnavailableError
from data.sources import content_identity, plan_slices, read_slice, with_absolute_paths
from tests.data.corpora import TEXTS, files, jsonl, texts_of, write


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_its_texts_in_order(tmp_path: Path, suffix: str) -> None:
    source = files(write(tmp_path / f"corpus.{suffix}", TEXTS))
    assert texts_of(source) == TEXTS
    assert texts_of(source, slice_bytes=1024) == TEXTS


def test_a_txt_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "empty.txt").touch()
    assert texts_of(files(tmp_path / "*.txt")) == ["one", "two\r\nlines"]


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=600), min_size=1, max_size=40
    ),
    slice_bytes=st.integers(16, 4000),
)
def test_byte_ranges_of_a_jsonl_file_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], slice_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "corpus.jsonl"
    path.write_bytes(jsonl(lines).rstrip(b"\n"))
    assert texts_of(files(path), slice_bytes) == lines


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab\n\u00e9\U0001f600"), min_size=1500, max_size=6000))
def test_a_long_txt_file_is_cut_between_characters_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("txt") / "long.txt"
    path.write_bytes(text.encode())
    pieces = texts_of(files(path, max_txt_document_bytes=1024), slice_bytes=2048)
    assert "".join(pieces) == text
    for end in range(1, len(pieces)):
        assert pieces[end - 1].endswith("\n") or "\n" not in "".join(pieces[end:]), (
            "cut at a line end while there is one"
        )


def test_a_long_txt_file_without_line_ends_is_cut_near_every_limit(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes("\U0001f600".encode() * 200_000)
    pieces = texts_of(files(path, max_txt_document_bytes=100_001))
    assert "".join(pieces) == "\U0001f600" * 200_000
    assert len(pieces) == 8


def test_slices_are_planned_by_bytes_and_can_be_pickled(tmp_path: Path) -> None:
    source = files(write(tmp_path / "corpus.jsonl", ["x" * 1000] * 100))
    slices = plan_slices(source, 10_000)
    assert len(slices) == 11
    assert max(slice_.num_bytes for slice_ in slices) <= 10_000
    assert pickle.loads(pickle.dumps(slices)) == slices == plan_slices(source, 10_000)


def test_identity_follows_names_and_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", TEXTS)
    first = content_identity(files(path))
    assert content_identity(files(tmp_path / "*.jsonl")) == first
    path.write_bytes(path.read_bytes().replace(b"plain", b"PLAIN"))
    assert content_identity(files(path)) != first


def test_a_user_without_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "BMOJO_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it returns for a user id that is in no list
    assert cache_dir() == Path(tempfile.gettempdir(), f"bmojo-{os.getuid()}")


def test_relative_paths_can_be_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    source = with_absolute_paths(files("*.txt"))
    monkeypatch.chdir("/")
    assert texts_of(source) == ["a"]


def test_the_standard_library_is_read_without_tests_and_packages() -> None:
    source = PythonStdlibSource(kind="python_stdlib")
    slices = plan_slices(source, 4 << 20)
    names = [part.path for slice_ in slices for part in slice_.parts]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(Path(name).parts)]
    documents = list(read_slice(slices[0]))
    assert len(documents) > 50
    assert content_identity(source) == content_identity(source)


def test_a_hugging_face_data_set_is_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(["a" * 600, "b" * 600, "c"]))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = HuggingFaceSource(kind="huggingface", dataset=str(folder))
    assert texts_of(source, slice_bytes=1024) == ["a" * 600, "b" * 600, "c"]
    assert len(plan_slices(source, 1024)) > 1
    assert len(content_identity(source)) == 64
    with pytest.raises(DataError, match="no column 'body'; its columns are 'id', 'text'"):
        plan_slices(HuggingFaceSource(kind="huggingface", dataset=str(folder), text_field="body"), 1024)


class TestHuggingFace:
    """Folders in a data set's layout, and a Hub that fails."""

    @pytest.fixture(autouse=True)
    def _own_cache_and_sessions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pytest.importorskip("datasets")
        from huggingface_hub.utils import reset_sessions

        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        reset_sessions()  # they know from their start whether they may use the network
        yield
        reset_sessions()

    @staticmethod
    def folder(tmp_path: Path, column: pa.Array, **fields: Any) -> HuggingFaceSource:
        (tmp_path / "corpus").mkdir()
        pq.write_table(pa.table({"text": column}), tmp_path / "corpus" / "train.parquet")
        return HuggingFaceSource(kind="huggingface", dataset=str(tmp_path / "corpus"), **fields)

    @pytest.mark.parametrize(
        ("policy", "texts", "count"),
        [("replace", ["one", "tw\ufffd"], {}), ("skip_document", ["one"], {"invalid_utf8": 1})],
    )
    def test_the_policy_for_invalid_utf8_is_the_one_of_files(
        self, tmp_path: Path, policy: str, texts: list[str], count: dict[str, int]
    ) -> None:
        source = self.folder(tmp_path, pa.array([b"one", b"tw\xff"]), invalid_utf8=policy)
        left_out: Counter[str] = Counter()
        assert [d.text for slice_ in plan_slices(source, 99) for d in read_slice(slice_, left_out)] == texts
        assert left_out == count
        with pytest.raises(DataError, match="row 1, column 'text': invalid UTF-8 at byte 2"):
            texts_of(source.model_copy(update={"invalid_utf8": "error"}))

    def test_files_that_the_library_passes_over_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = self.folder(tmp_path, pa.array(["one"]))
        assert texts_of(source) == ["one"]
        assert "leaves out" not in caplog.text
        write(tmp_path / "corpus" / "more.jsonl", ["two"])
        assert texts_of(source) == ["one"]
        assert f"leaves out {tmp_path / 'corpus' / 'more.jsonl'}. Keep one format" in caplog.text

    def test_what_the_library_hides_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "train.jsonl").write_bytes(b'{"text": "a\\ud800"}\n')
        with pytest.raises(DataError, match=r"surrogate pair in string is invalid.*Check the files in the folder"):
            texts_of(HuggingFaceSource(kind="huggingface", dataset=str(tmp_path / "corpus")))

    @pytest.mark.parametrize("name", ["./gone", "~/gone", "~no-such-user/gone"])
    def test_a_folder_that_is_not_there(self, name: str) -> None:
        with pytest.raises(DataError, match=rf"dataset={name}: there is no such folder"):
            content_identity(HuggingFaceSource(kind="huggingface", dataset=name))

    def test_a_name_longer_than_any_path(self) -> None:
        source = HuggingFaceSource(kind="huggingface", dataset="x" * 300)
        assert with_absolute_paths(source) == source
        with pytest.raises(DataError, match="maximum length is 96"):
            content_identity(source)

    @pytest.mark.parametrize(
        ("status", "error"),
        [(503, SourceUnavailableError), (429, SourceUnavailableError), (404, DataError), (401, DataError)],
    )
    def test_a_hub_that_fails_and_a_question_it_refuses_are_told_apart(
        self, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
    ) -> None:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        source = HuggingFaceSource(kind="huggingface", dataset="owner/name")
        with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(error, match=rf"dataset=owner/name: the Hub did not tell its commit: .*{status}"):
                content_identity(source)
            server.shutdown()
        with pytest.raises(SourceUnavailableError, match="The Hub cannot be reached now"):  # nobody listens any more
            content_identity(source)

    def test_a_hub_that_was_switched_off_by_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match="offline mode is enabled"):
            content_identity(HuggingFaceSource(kind="huggingface", dataset="owner/name"))


class TestBadInput:
    """What was found, where, what was expected, the next step."""

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"source.paths: there is no file .*gone.txt"):
            content_identity(files(tmp_path / "gone.txt"))

    def test_glob_without_match(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file matches '.*\*\.jsonl'"):
            content_identity(files(tmp_path / "*.jsonl"))

    def test_folder_instead_of_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"is a folder. Name files in it, for example .*/\*\.jsonl"):
            content_identity(files(tmp_path))

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "corpus.csv").write_text("a,b")
        with pytest.raises(DataError, match=r"corpus.csv: cannot tell the format.*\.jsonl\.zst"):
            content_identity(files(tmp_path / "corpus.csv"))

    def test_files_of_no_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").touch()
        with pytest.raises(DataError, match="empty corpus: all 1 files have 0 bytes"):
            plan_slices(files(tmp_path / "a.txt"), 1024)

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.parquet"])
    def test_a_file_cut_off_before_its_first_byte(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name}: .*0 bytes.*etch"):
            texts_of(files(write(tmp_path / "good.jsonl", TEXTS), tmp_path / name))

    @pytest.mark.parametrize("policy", ["error", "replace", "skip_document"])
    @pytest.mark.parametrize(
        ("name", "raw", "message"),
        [
            ("a.txt", "text".encode("utf-16"), "UTF-16 .*ff fe.*iconv -f UTF-16"),
            ("a.txt", "\ufefftext".encode("utf-16-be"), "UTF-16 .*fe ff.*iconv -f UTF-16"),
            ("a.txt", "text".encode("utf-32"), "UTF-32 .*ff fe 00 00.*iconv -f UTF-32"),
            ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "UTF-16 .*iconv -f UTF-16"),
            ("a.jsonl.gz", gzip.compress('{"text": "x"}\n'.encode("utf-16"), mtime=0), "UTF-16 .*iconv -f UTF-16"),
            ("a.txt", gzip.compress(b"text", mtime=0), "compressed by gzip .*decompress it"),
            ("a.jsonl", gzip.compress(b'{"text": "x"}\n', mtime=0), r"compressed by gzip .*Name the file \.jsonl\.gz"),
            ("a.jsonl", zstandard.compress(b'{"text": "x"}\n'), r"compressed by zstd .*Name the file \.jsonl\.zst"),
            ("a.jsonl.gz", gzip.compress(gzip.compress(b'{"text": "x"}\n', mtime=0), mtime=0), "compressed by gzip"),
        ],
    )
    def test_files_that_are_no_utf8_whatever_the_policy(
        self, tmp_path: Path, policy: str, name: str, raw: bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=rf"{name}: this is {message}"):
            texts_of(files(tmp_path / name, invalid_utf8=policy))

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("x" * 300 + ".jsonl", r"xxx\.\.\.: File name too long"),
            ("x" * 300 + "*.jsonl", r"xxx\.\.\.: File name too long"),
            ("~no-such-user/x.jsonl", "~no-such-user/x.jsonl: no such user"),
        ],
    )
    def test_paths_that_lead_nowhere(self, path: str, message: str) -> None:
        with pytest.raises(DataError, match=rf"source.paths: .*{message}"):
            content_identity(files(path))

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, tmp_path / "c.parquet")
        with pytest.raises(DataError, match=r"c.parquet: 2 columns are named 'text'"):
            texts_of(files(tmp_path / "c.parquet"))

    @pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
    def test_cut_off_compressed_file(self, tmp_path: Path, suffix: str) -> None:
        texts = [f"{i} {hash(i * 7919)}" for i in range(20_000)]
        path = write(tmp_path / f"corpus.{suffix}", texts)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(
            DataError, match=rf"corpus.{suffix}: the compressed stream is damaged or cut off after line \d"
        ):
            texts_of(files(path))

    def test_gz_with_a_wrong_checksum(self, tmp_path: Path) -> None:
        path = write(tmp_path / "corpus.jsonl.gz", TEXTS)
        data = bytearray(path.read_bytes())
        data[-6] ^= 0xFF
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"corpus.jsonl.gz: .* after line 6: CRC check failed"):
            texts_of(files(path))

    def test_file_that_is_not_gz_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "corpus.jsonl.gz").write_bytes(jsonl(TEXTS))
        with pytest.raises(DataError, match="Not a gzipped file"):
            texts_of(files(tmp_path / "corpus.jsonl.gz"))

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "a"', "not JSON"),
            (b'{"body": "a"}', "no field 'text'; its fields are 'body'"),
            (b'{"text": 3}', "field 'text' is a JSON number, expected a string"),
            (b'{"text": null}', "field 'text' is a JSON null"),
            (b'["a"]', "found a JSON array"),
            (b'{"text": "a\xffb"}', "invalid UTF-8 at byte 11"),
            (b'{"text": "a\\ud800b"}', r"lone surrogate U\+D800"),
        ],
    )
    def test_bad_jsonl_line(self, tmp_path: Path, line: bytes, message: str, compressed: bool) -> None:
        path = tmp_path / ("corpus.jsonl.gz" if compressed else "corpus.jsonl")
        data = jsonl(["good"] * 50) + b"\n" + line + b"\n" + jsonl(["good"])
        path.write_bytes(gzip.compress(data) if compressed else data)
        with pytest.raises(DataError, match=rf"corpus.jsonl(.gz)?, line 52: .*{message}"):
            texts_of(files(path), slice_bytes=256)

    def test_invalid_utf8_by_policy(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"ok")
        (tmp_path / "b.txt").write_bytes(b"caf\xe9!")
        (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\udc00x"}\n' + jsonl(["good"]))
        paths = tmp_path / "*"
        with pytest.raises(DataError, match=r"b.txt: invalid UTF-8 at byte 3 \(byte 3 of the file\): found 0xe9"):
            texts_of(files(paths))
        assert texts_of(files(paths, invalid_utf8="skip_document")) == ["ok", "good"]
        replaced = texts_of(files(paths, invalid_utf8="replace"))
        assert replaced[:2] == ["ok", "caf\ufffd!"]
        assert replaced[2:] == ["\ufffd", "\ufffdx", "good"]

    def test_parquet_without_the_column(self, tmp_path: Path) -> None:
        path = write(tmp_path / "corpus.parquet", TEXTS)
        with pytest.raises(DataError, match=r"corpus.parquet: no column 'body'; its columns are 'text'"):
            plan_slices(files(path, text_field="body"), 1024)

    def test_parquet_column_that_is_no_text_or_null(self, tmp_path: Path) -> None:
        path = tmp_path / "corpus.parquet"
        pq.write_table(pa.table({"text": [1, 2]}), path)
        with pytest.raises(DataError, match="column 'text' has type int64, expected string"):
            plan_slices(files(path), 1024)
        pq.write_table(pa.table({"text": ["a", None]}), path)
        with pytest.raises(DataError, match="row 1, column 'text': found null"):
            texts_of(files(path))

    def test_cut_off_parquet(self, tmp_path: Path) -> None:
        path = write(tmp_path / "corpus.parquet", TEXTS)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(DataError, match="not a whole parquet file"):
            plan_slices(files(path), 1024)

    def test_file_changed_after_planning(self, tmp_path: Path) -> None:
        path = write(tmp_path / "corpus.jsonl", TEXTS)
        slices = plan_slices(files(path), 1 << 20)
        path.write_bytes(jsonl(["other"]))
        with pytest.raises(DataError, match="when the work was planned"):
            list(read_slice(slices[0]))

    def test_unknown_key_in_a_source(self) -> None:
        with pytest.raises(ValueError, match="text_feild"):
            TypeAdapter(Source).validate_python({"kind": "files", "paths": "a.txt", "text_feild": "x"})
