"""Sources: every format is read whole, slices cover each document once, and bad input is a clear error."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

from data.config import FilesSource, HuggingFaceSource, PythonStdlibSource, Source
from data.errors import DataError, SourceUnavailableError
from data.sources import Part, content_identity, duplicate_files, plan_slices, read_slice, with_absolute_paths
from data.sources.digests import cache_root

TEXTS = ["plain", "zwei\nlines\r\n", "\u00e9\U0001f600\u2028", "<|endoftext|>", "x" * 5000, "\ufeffmark"]


def files(*paths: object, **fields: Any) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(map(str, paths)), **fields)


def texts_of(source: Source, slice_bytes: int = 1 << 20) -> list[str]:
    return [document.text for slice_ in plan_slices(source, slice_bytes) for document in read_slice(slice_)]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Nothing is forbidden to root: as another user meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def write(path: Path, texts: list[str]) -> Path:
    """A corpus in the format of the path's suffix."""
    match path.name.partition(".")[2]:
        case "jsonl":
            path.write_bytes(jsonl(texts))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(jsonl(texts)))
        case "jsonl.zst":
            frames = [zstandard.compress(jsonl(texts[:2])), zstandard.compress(jsonl(texts[2:]))]
            path.write_bytes(b"".join(frames))
        case "txt":
            path.write_text("".join(texts))
        case "parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
    return path


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


def test_the_digest_of_a_big_file_is_remembered_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.sources import digests

    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_CACHED_FROM_BYTES", 1)
    path = tmp_path / "big.txt"
    path.write_text("one")
    first = digests.file_sha256(path)
    with monkeypatch.context() as patched:
        patched.setattr(digests, "_read_sha256", lambda path: pytest.fail("read again"))
        assert digests.file_sha256(path) == first
    path.write_text("other")
    assert digests.file_sha256(path) != first


def test_a_user_without_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "BMOJO_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it returns for a user id that is in no list
    assert cache_root() == Path(tempfile.gettempdir(), f"bmojo-{os.getuid()}")


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
            ("a.jsonl.gz", gzip.compress('{"text": "x"}\n'.encode("utf-16")), "UTF-16 .*iconv -f UTF-16"),
            ("a.txt", gzip.compress(b"text"), "compressed by gzip .*decompress it"),
            ("a.jsonl", gzip.compress(b'{"text": "x"}\n'), r"compressed by gzip .*Name the file \.jsonl\.gz"),
            ("a.jsonl", zstandard.compress(b'{"text": "x"}\n'), r"compressed by zstd .*Name the file \.jsonl\.zst"),
            ("a.jsonl.gz", gzip.compress(gzip.compress(b'{"text": "x"}\n')), "compressed by gzip"),
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
            ("s3://bucket/x.jsonl", "s3://bucket/x.jsonl is an address"),
            ("https://example.com/*.jsonl", r"https://example.com/\*.jsonl is an address"),
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
