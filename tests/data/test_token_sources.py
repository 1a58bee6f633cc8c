"""Sources with token ids of their own: every document comes back, whatever wrote the file and however it is cut."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import BytesSource, Packing, Source, SyntheticSource, TokenizeFields, TokensSource
from data.errors import DataError
from data.records import IS_ANSWER, SPLITS, ShardsSummary
from data.shards import TokenBatch, TokenSplit, read_token_batches, read_token_documents
from data.sources import TokenDocument, content_identity, duplicate_files, local_paths, plan_slices, read_slice, stamp
from data.tasks.mqar import Mqar
from data.tokenizer import byte_tokenizer, load_tokenizer
from tests.data.here import tokenize_here

EOD = 0


def tokens(*paths: Path, vocab_size: int = 1000, **fields: Any) -> TokensSource:
    return TokensSource(kind="tokens", paths=tuple(map(str, paths)), vocab_size=vocab_size, **fields)


def read(source: Source, slice_bytes: int = 1 << 20) -> list[list[int]]:
    """The documents. Names are checked to be unique, and bytes to be where they are said to stand."""
    found = []
    for document in (document for slice_ in plan_slices(source, slice_bytes) for document in read_slice(slice_)):
        assert isinstance(document, TokenDocument)
        found.append(document)
        if document.start >= 0:
            path = Path(document.id.rpartition(":")[0])
            assert path.read_bytes()[document.start : document.end] == document.ids.tobytes()
    assert len({document.id for document in found}) == len(found)
    return [document.ids.tolist() for document in found]


def between_ends(ids: Sequence[int]) -> list[list[int]]:
    """What stands between the ends of documents, by the plainest way there is."""
    runs = itertools.groupby(ids, key=lambda token: token == EOD)
    return [list(run) for is_end, run in runs if not is_end]


def write_megatron(path: Path, documents: list[list[list[int]]], code: int, dtype: str) -> None:
    """Documents of sequences, as Megatron-LM's IndexedDatasetBuilder writes them (MMIDIDX, version 1)."""
    sequences = [sequence for document in documents for sequence in document]
    path.write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    size = np.dtype(dtype).itemsize
    lengths = [len(sequence) for sequence in sequences]
    places = [size * sum(lengths[:i]) for i in range(len(lengths))]
    firsts = [0, *itertools.accumulate(map(len, documents))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    body = struct.pack(f"<{len(lengths)}i{len(places)}q{len(firsts)}q", *lengths, *places, *firsts)
    path.with_suffix(".idx").write_bytes(head + body)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=300),
    slice_bytes=st.sampled_from([1024, 2, 10, 50]),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
    with_header=st.booleans(),
)
def test_a_stream_is_cut_at_the_ends_of_documents_wherever_slices_begin(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], slice_bytes: int, dtype: str, with_header: bool
) -> None:
    path = tmp_path_factory.mktemp("ids") / "train.npy"
    if with_header:
        np.save(path, np.array(ids, dtype))  # numpy's own
    else:
        np.array(ids, dtype).tofile(path)  # nanoGPT's; OLMo-core's, which is named .npy
    source = tokens(path, vocab_size=6, eod_id=EOD, dtype=dtype)
    assert read(source, slice_bytes) == between_ends(ids)
    assert read(source.model_copy(update={"document_tokens": 7}), slice_bytes) == [
        document[start : start + 7] for document in between_ends(ids) for start in range(0, len(document), 7)
    ]


def test_ends_of_documents_are_found_across_the_blocks_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.tokens._SCANNED", 8)
    ids = np.random.default_rng(0).integers(0, 12, 500).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    for slice_bytes in (16, 20, 1 << 20):
        assert read(tokens(tmp_path / "train.bin", eod_id=EOD), slice_bytes) == between_ends(ids.tolist())


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), max_size=3), min_size=1, max_size=20
    ).filter(lambda documents: any(documents)),
    slice_bytes=st.sampled_from([2, 40, 1024]),
    dtype=st.sampled_from([(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")]),
)
def test_documents_of_megatron_are_those_of_its_index(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[list[int]]],
    slice_bytes: int,
    dtype: tuple[int, str],
) -> None:
    path = tmp_path_factory.mktemp("ids") / "text_document.bin"
    write_megatron(path, documents, *dtype)
    whole = [[token for sequence in document for token in sequence] for document in documents]
    plain = tokens(path, vocab_size=6)
    assert read(plain, slice_bytes) == [document for document in whole if document]
    with_ends = [part for document in whole for part in between_ends(document)]
    assert read(tokens(path.with_name("*"), vocab_size=6, eod_id=EOD), slice_bytes) == with_ends


def test_rows_and_stretches_of_equal_length_are_documents(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.int32).reshape(12, 5)
    np.save(tmp_path / "rows.npy", rows)
    np.arange(60, dtype=np.uint8).tofile(tmp_path / "rows.bin")
    for slice_bytes in (1, 50, 1000):
        assert read(tokens(tmp_path / "rows.npy"), slice_bytes) == rows.tolist()
        assert read(tokens(tmp_path / "rows.bin", dtype="uint8", document_tokens=5), slice_bytes) == rows.tolist()
    source = tokens(tmp_path / "rows.npy", vocab_size=60)
    assert source.vocabulary == (61, 60, False)
    assert tokens(tmp_path / "rows.npy", vocab_size=60, eod_id=59).vocabulary == (60, 59, False)


def test_ids_that_cannot_be_are_errors_that_name_the_place(tmp_path: Path) -> None:
    np.array([1, 2, EOD, 3, 700], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin, id 3: it holds id 700, expected 0 to 699 \(source\.vocab_size\)"):
        read(tokens(tmp_path / "a.bin", vocab_size=700, eod_id=EOD))
    np.save(tmp_path / "b.npy", np.array([1, -1]))
    with pytest.raises(DataError, match=r"b\.npy, id 0: it holds id -1, expected 0 to 699"):
        read(tokens(tmp_path / "b.npy", vocab_size=700))
    with pytest.raises(ValueError, match="eod_id=700 is none of the 700 ids"):
        tokens(tmp_path / "a.bin", vocab_size=700, eod_id=700)


def test_files_that_are_no_ids_are_errors(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"odd\.bin: 3 bytes are no whole number of ids of type uint16"):
        read(tokens(tmp_path / "odd.bin"))
    np.save(tmp_path / "real.npy", np.ones(3))
    with pytest.raises(DataError, match=r"real\.npy: an array of float64 of 1 dimensions, expected integers"):
        read(tokens(tmp_path / "real.npy"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.ones((3, 4), int)))
    with pytest.raises(DataError, match=r"columns\.npy: stored column by column"):
        read(tokens(tmp_path / "columns.npy"))
    np.save(tmp_path / "cut.npy", np.ones(100, int))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:300])
    with pytest.raises(DataError, match=r"cut\.npy: not a whole array of numpy"):
        read(tokens(tmp_path / "cut.npy"))
    write_megatron(tmp_path / "m.bin", [[[1, 2], [3]], [[4]]], 8, "<u2")
    whole = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(whole[:6])
    with pytest.raises(DataError, match=r"m\.bin: document 1 is not where m\.idx beside it says"):
        read(tokens(tmp_path / "m.bin"))
    (tmp_path / "m.idx").write_bytes((tmp_path / "m.idx").read_bytes()[:40])
    with pytest.raises(DataError, match=r"m\.idx: not a whole index of Megatron-LM"):
        read(tokens(tmp_path / "m.bin"))
    with pytest.raises(DataError, match=r"is a folder. Name files in it, for example .*/\*\.bin"):
        read(tokens(tmp_path))


def test_what_a_source_reads_is_part_of_its_identity(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m.bin", [[[1, 2]], [[3]]], 8, "<u2")
    source = tokens(tmp_path / "m.bin")
    (tmp_path / "again.bin").symlink_to("m.bin")
    before = content_identity(source), stamp(source)
    write_megatron(tmp_path / "m.bin", [[[1]], [[2, 3]]], 8, "<u2")  # the same ids, other documents
    assert content_identity(source) != before[0]
    assert stamp(source) != before[1]
    assert local_paths(source) == (str(tmp_path / "m.bin"),)
    both = tokens(tmp_path / "m.bin", tmp_path / "again.bin")
    assert [Path(name).name for name in duplicate_files(both)] == ["again.bin"]


@settings(max_examples=30, deadline=None)
@given(raw=st.binary(min_size=1, max_size=200), document_bytes=st.integers(1, 250), slice_bytes=st.integers(1, 100))
def test_bytes_of_a_file_are_its_ids(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, document_bytes: int, slice_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "any.wav"
    path.write_bytes(raw)
    source = BytesSource(kind="bytes", paths=(str(path),), document_bytes=document_bytes)
    assert read(source, slice_bytes) == [
        list(raw[start : start + document_bytes]) for start in range(0, len(raw), document_bytes)
    ]


def test_the_tokenizer_of_bytes_gives_byte_ids_and_comes_back(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "é\U0001f600\x00 <|endoftext|>"
    assert tokenizer.encode_batch([text])[0].tolist() == list(text.encode())
    assert tokenizer.decode(range(257)) == bytes(range(256))
    vocabulary = BytesSource(kind="bytes", paths=("x",)).vocabulary
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (vocabulary.size, vocabulary.eod_id)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def pack(source: Source, folder: Path, seq_len: int, packing: Packing = "stream") -> ShardsSummary:
    fields = TokenizeFields(source=source, seq_len=seq_len, slice_bytes=1024, validation_fraction=0.3, packing=packing)
    return tokenize_here(None, fields, folder).summary


@pytest.mark.parametrize("packing", get_args(Packing))
@pytest.mark.parametrize("seq_len", [5, 37, 200])
def test_the_loss_counts_answers_and_nothing_else(tmp_path: Path, seq_len: int, packing: Packing) -> None:
    task = Mqar(kind="mqar", num_pairs=4, num_queries=3, seq_len=24)
    source = SyntheticSource(kind="synthetic", task=task, num_documents=60, seed=3)
    summary = pack(source, tmp_path, seq_len, packing)
    assert summary.format.has_loss_mask
    assert summary.format.tokenizer_sha256 is None
    assert (summary.format.vocab_size, summary.format.eod_id) == (65, 64)
    drawn = {}
    for slice_ in plan_slices(source, 1024):
        for document in read_slice(slice_):
            assert isinstance(document, TokenDocument)
            assert document.loss_mask is not None
            drawn[tuple(document.ids.tolist())] = document.ids[document.loss_mask == IS_ANSWER].tolist()
    assert len(drawn) == 60
    found = []
    for split in SPLITS:
        documents = list(read_token_documents(TokenSplit(tmp_path, split)))
        answers = [drawn[tuple(ids.tolist())] for ids in documents]
        batches = list(read_token_batches(TokenSplit(tmp_path, split), batch_size=3, world_size=1))
        targets = torch.cat([batch.targets_bt[batch.targets_bt >= 0] for batch in batches])
        assert targets.tolist() == [answer for of_document in answers for answer in of_document]
        assert summary.counts[split].num_tokens == sum(len(ids) + 1 for ids in documents)
        assert summary.counts[split].num_bytes == 0
        found.append(len(answers))
    assert sum(found) == 60


@pytest.mark.parametrize("packing", get_args(Packing))
def test_the_tokens_that_answers_are_read_off_are_marked_if_asked(tmp_path: Path, packing: Packing) -> None:
    """In both splits, across samples, and with the same tokens and answers as without marks."""
    task = Mqar(kind="mqar", num_pairs=4, num_queries=3, seq_len=24)
    batches: dict[bool, list[TokenBatch]] = {}
    for marked in (False, True):
        source = SyntheticSource(kind="synthetic", task=task, num_documents=60, seed=3, mark_sources=marked)
        folder = tmp_path / str(marked)
        pack(source, folder, 37, packing)
        batches[marked] = [
            batch for split in SPLITS for batch in read_token_batches(TokenSplit(folder, split), 3, world_size=1)
        ]
    num_wanted = 0
    for plain, batch in zip(batches[False], batches[True], strict=True):
        assert all(torch.equal(*pair) for pair in zip(plain[:3], batch[:3], strict=True))
        assert plain.wanted_bt is not None
        assert batch.wanted_bt is not None
        assert not plain.wanted_bt.any()
        num_wanted += int(batch.wanted_bt.sum())
        for row, column in batch.wanted_bt.nonzero().tolist():
            later = batch.doc_ids_bt[row] == batch.doc_ids_bt[row, column]
            answers = batch.targets_bt[row][later & (batch.targets_bt[row] >= 0)]
            if len(answers) == task.num_queries:  # else the document is cut
                assert batch.tokens_bt[row, column] in answers
    assert num_wanted == 60 * task.num_queries


def test_made_up_documents_do_not_depend_on_how_they_are_cut_into_slices() -> None:
    def all_ids(slice_bytes: int, **fields: Any) -> list[list[int]]:
        settings: dict[str, Any] = {"num_documents": 30, "seed": 1, **fields}
        return read(SyntheticSource(kind="synthetic", task=Mqar(kind="mqar"), **settings), slice_bytes)

    assert all_ids(1) == all_ids(1 << 20)
    assert len(plan_slices(SyntheticSource(kind="synthetic", task=Mqar(kind="mqar"), num_documents=30), 1024)) > 5
    assert all_ids(1024, num_documents=40)[:30] == all_ids(1024)
    assert all_ids(1024, seed=2) != all_ids(1024)


def test_equal_documents_go_to_the_same_split_whatever_the_type_of_their_ids(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (200, 3))
    np.save(tmp_path / "a.npy", rows.astype(np.uint8))
    np.save(tmp_path / "b.npy", rows.astype(np.int64))
    pack(tokens(tmp_path / "a.npy", tmp_path / "b.npy", vocab_size=9), tmp_path / "out", seq_len=16)
    train, valid = (
        {tuple(ids.tolist()) for ids in read_token_documents(TokenSplit(tmp_path / "out", split))} for split in SPLITS
    )
    assert train
    assert valid
    assert not train & valid
