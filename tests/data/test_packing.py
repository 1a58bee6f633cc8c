"""Packing loses nothing, splits by hash, and gives the same bytes every time."""

from __future__ import annotations

import filecmp
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DamagedError
from data import packing
from data.config import FilesSource, TokenizeFields
from data.errors import DataError
from data.packing import write_slice
from data.records import SPLITS, ShardsSummary, Split
from data.shards import TokenSplit, read_token_batches, read_token_documents
from data.sources import plan_slices, slice_bytes_of
from data.tokenizer import Tokenizer
from tests.data.here import tokenize_here

FRACTION = 0.3


def pack(
    tokenizer: Tokenizer, texts: list[str], folder: Path, seq_len: int = 16, slice_bytes: int = 1024, **fields: object
) -> ShardsSummary:
    """Pack texts in this process. Returns what the tokenize stage would."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizeFields(
        source=FilesSource(kind="files", paths=(str(path),)),
        seq_len=seq_len,
        slice_bytes=slice_bytes,
        **{"validation_fraction": FRACTION, **fields},
    )
    return tokenize_here(tokenizer, config, folder).summary


def documents(tokenizer: Tokenizer, folder: Path, summary: ShardsSummary, split: Split) -> list[str]:
    if not summary.counts[split].num_samples:
        return []
    return [tokenizer.decode(ids).decode() for ids in read_token_documents(TokenSplit(folder, split))]


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), min_size=12, max_size=40),
    seq_len=st.integers(2, 40),
)
def test_documents_come_back_whole_and_every_byte_is_a_target_once(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, texts: list[str], seq_len: int
) -> None:
    texts = [*texts, "<|endoftext|> always", "another one", *map(str, range(20))]
    folder = tmp_path_factory.mktemp("packed")
    summary = pack(tokenizer, texts, folder, seq_len)
    back = {split: documents(tokenizer, folder, summary, split) for split in SPLITS}
    assert sorted(back["train"] + back["valid"]) == sorted(text for text in texts if text)
    assert not set(back["train"]) & set(back["valid"])

    for split in SPLITS:
        counts = summary.counts[split]
        assert counts.num_bytes == sum(len(text.encode()) for text in back[split])
        assert counts.num_documents == len(back[split])
        batches = list(read_token_batches(TokenSplit(folder, split), batch_size=3))
        targets = torch.cat([batch.targets_bt[batch.targets_bt >= 0] for batch in batches])
        assert len(targets) == counts.num_tokens
        assert tokenizer.token_num_bytes[targets.numpy()].sum() == counts.num_bytes
        assert sum(len(batch.tokens_bt) for batch in batches) == counts.num_samples


def test_the_model_starts_each_document_from_its_own_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack(tokenizer, ["first text", "second"], tmp_path, seq_len=64, validation_fraction=0)
    (batch,) = read_token_batches(TokenSplit(tmp_path, "train"), batch_size=4)
    first, second = tokenizer.encode_batch(["first text", "second"])
    eod = [tokenizer.eod_id]
    stream = np.concatenate([eod, first, eod, second, eod])
    num_inputs = len(stream) - 1
    assert batch.tokens_bt[0, :num_inputs].tolist() == stream[:-1].tolist()
    assert batch.targets_bt[0, :num_inputs].tolist() == stream[1:].tolist()
    doc_ids = [1] * (1 + len(first)) + [2] * (1 + len(second))
    assert batch.doc_ids_bt[0, :num_inputs].tolist() == doc_ids
    assert batch.targets_bt[0, num_inputs:].eq(-100).all()
    assert batch.doc_ids_bt[0, num_inputs:].eq(-1).all()


def test_neighbouring_samples_overlap_by_one_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack(tokenizer, ["some longer text " * 50], tmp_path, seq_len=8, validation_fraction=0)
    (batch,) = read_token_batches(TokenSplit(tmp_path, "train"), batch_size=1000)
    assert batch.targets_bt[:-1, -1].tolist() == batch.tokens_bt[1:, 0].tolist()
    assert torch.equal(batch.doc_ids_bt[1:-1], torch.zeros_like(batch.doc_ids_bt[1:-1]))


def test_the_same_text_gives_the_same_bytes_and_rewriting_replaces_a_torn_slice(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [f"text number {i}" * 5 for i in range(200)]
    first = pack(tokenizer, texts, tmp_path / "a")
    torn = tmp_path / "b" / "train" / "slice-00001"
    torn.mkdir(parents=True)
    (torn / "shard.00000.mds").write_bytes(b"torn")
    (torn / "shard.00009.mds").write_bytes(b"left over")
    second = pack(tokenizer, texts, tmp_path / "b")
    assert first == second
    comparison = filecmp.dircmp(tmp_path / "a", tmp_path / "b")
    assert not comparison.left_only + comparison.right_only + comparison.diff_files
    assert (torn / "shard.00000.mds").read_bytes() == (tmp_path / "a/train/slice-00001/shard.00000.mds").read_bytes()
    assert not (torn / "shard.00009.mds").exists()


def test_shards_are_cut_at_the_size_limit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["text " * 2000] * 3
    pack(tokenizer, texts, tmp_path, validation_fraction=0, shard_bytes=4096, slice_bytes=1 << 20)
    sizes = [path.stat().st_size for path in (tmp_path / "train/slice-00000").glob("*.mds")]
    assert len(sizes) > 2
    assert max(sizes) <= 4096


def test_the_validation_share_is_what_was_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    summary = pack(tokenizer, [f"document {i}" for i in range(2000)], tmp_path, slice_bytes=1 << 20)
    deviation = math.sqrt(2000 * FRACTION * (1 - FRACTION))
    assert abs(summary.counts["valid"].num_documents - 2000 * FRACTION) < 4 * deviation


def test_bad_text_leaves_nothing_of_the_slice_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "' + "fine " * 5000 + '"}\n{"text": 1}\n')
    fields = TokenizeFields(
        source=FilesSource(kind="files", paths=(str(tmp_path / "corpus.jsonl"),)), seq_len=4, shard_bytes=4096
    )
    (slice_,) = plan_slices(fields.source, slice_bytes_of(fields))
    with pytest.raises(DataError, match="line 2"):
        write_slice(slice_, tokenizer, fields, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mds"))
    assert not list((tmp_path / "out").rglob("slice-*"))


def test_a_split_without_documents_is_an_error_that_names_the_fraction(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 1 documents went to the valid split \(validation_fraction=1e-06"):
        pack(tokenizer, ["only one"], tmp_path / "a", validation_fraction=1e-6)
    assert not list(tmp_path.rglob("index.json"))
    with pytest.raises(DataError, match="Set validation_fraction to 0 to do without validation"):
        pack(tokenizer, ["only one"], tmp_path / "a", validation_fraction=0.9)
    with pytest.raises(DataError, match="no document holds any text"):
        pack(tokenizer, ["", ""], tmp_path / "b")


@pytest.mark.parametrize("validation_fraction", [0.01, 0.9999])
@pytest.mark.parametrize("slice_bytes", [1024, 1 << 20])
def test_equal_documents_are_named_as_the_cause(
    tokenizer: Tokenizer, tmp_path: Path, validation_fraction: float, slice_bytes: int
) -> None:
    with pytest.raises(DataError, match=r"none of the 500 documents .*: all hold the same text.*whatever validation_f"):
        pack(
            tokenizer, ["the same text"] * 500, tmp_path,
            validation_fraction=validation_fraction, slice_bytes=slice_bytes,
        )  # fmt: skip


@pytest.mark.parametrize("validation_fraction", [1e-6, 0.9999999])
def test_the_fraction_that_the_error_names_splits_the_documents(
    tokenizer: Tokenizer, tmp_path: Path, validation_fraction: float
) -> None:
    texts = [f"document {i}" for i in range(7)] * 3
    with pytest.raises(DataError, match="which splits these documents") as raised:
        pack(tokenizer, texts, tmp_path, validation_fraction=validation_fraction)
    (named,) = re.findall(r"Set validation_fraction to (\S+),", str(raised.value))
    counts = pack(tokenizer, texts, tmp_path, validation_fraction=float(named)).counts
    assert min(count.num_documents for count in counts.values()) > 0


def test_documents_for_validation_of_many_slices_are_packed_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"{i}: " + "some words " * 8 for i in range(200)]
    one = pack(tokenizer, texts, tmp_path / "one", seq_len=64, slice_bytes=1 << 20)
    assert not (tmp_path / "one/train/slice-00001").exists()
    many = pack(tokenizer, texts, tmp_path / "many", seq_len=64)
    assert (tmp_path / "many/train/slice-00010").exists()
    assert one.counts["train"].num_padded_tokens(64) < 64 < many.counts["train"].num_padded_tokens(64)
    assert one.index_sha256["valid"] == many.index_sha256["valid"]


def test_much_validation_makes_several_streams_of_consecutive_slices(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_VALIDATION_SAMPLES", 20)
    monkeypatch.setattr(packing, "_VALIDATION_SHARDS", 0)
    texts = [f"{i}: " + "some words " * 8 for i in range(300)]
    summary = pack(tokenizer, texts, tmp_path, seq_len=64, validation_fraction=0.9)
    tokens = TokenSplit(tmp_path, "valid")
    of_stream = [
        int(tokens.index.shard_samples[tokens.index.folders == number].sum())
        for number in np.unique(tokens.index.folders)
    ]
    assert len(of_stream) == summary.counts["valid"].num_tokens // (20 * 64)
    assert min(of_stream) >= 15
    back = documents(tokenizer, tmp_path, summary, "valid") + documents(tokenizer, tmp_path, summary, "train")
    assert sorted(back) == sorted(texts)
    in_order = [int(text.partition(":")[0]) for text in documents(tokenizer, tmp_path, summary, "valid")]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("packing_", ["stream", "best_fit"])
def test_what_is_cut_is_counted(tokenizer: Tokenizer, tmp_path: Path, packing_: str) -> None:
    texts = [f"{i}: " + "some words " * (i % 40) for i in range(200)]
    summary = pack(tokenizer, texts, tmp_path, seq_len=64, slice_bytes=1 << 20, packing=packing_)
    for split in SPLITS:
        num_cut, num_targets = 0, 0
        eod = tokenizer.eod_id
        of_sample = [sample["tokens"][1:].tolist() for sample in TokenSplit(tmp_path, split).samples()]
        num_targets = sum(map(len, of_sample))
        # A document goes on in the next sample if this one does not end with an end.
        runs = "".join("e" if targets[-1] == eod else "c" for targets in of_sample)
        samples_with_end = [eod in targets for targets in of_sample]
        for i, kind in enumerate(runs):
            begins = i == 0 or runs[i - 1] == "e" or samples_with_end[i]
            num_cut += kind == "c" and begins
        counts = summary.counts[split]
        assert counts.num_cut_documents == num_cut
        assert counts.num_padded_tokens(64) == 64 * len(of_sample) - num_targets
    back = [text for split in SPLITS for text in documents(tokenizer, tmp_path, summary, split)]
    assert sorted(back) == sorted(texts)
    too_long = sum(len(ids) >= 64 for ids in tokenizer.encode_batch(texts))
    num_cut = sum(counts.num_cut_documents for counts in summary.counts.values())
    assert (num_cut == too_long) if packing_ == "best_fit" else (num_cut > too_long > 0)


@pytest.mark.parametrize(
    ("text_bytes", "seq_len", "slice_bytes"),
    [(1 << 20, 1024, 8 << 20), (128 << 24, 1024, 16 << 20), (1 << 42, 1024, 512 << 20), (1 << 20, 1 << 16, 16 << 20),
     (1 << 42, 1 << 22, 1 << 30)],
)  # fmt: skip
def test_slices_grow_with_the_source_unless_their_size_is_set(
    tmp_path: Path, text_bytes: int, seq_len: int, slice_bytes: int
) -> None:
    with open(tmp_path / "corpus.txt", "wb") as file:
        file.truncate(text_bytes)  # sparse
    source = FilesSource(kind="files", paths=(str(tmp_path / "corpus.txt"),))
    assert slice_bytes_of(TokenizeFields(source=source, seq_len=seq_len)) == slice_bytes
    assert slice_bytes_of(TokenizeFields(source=source, seq_len=seq_len, slice_bytes=2000)) == 2000


def test_a_missing_or_cut_off_shard_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack(tokenizer, ["text " * 100] * 3, tmp_path, validation_fraction=0)
    with pytest.raises(DataError, match=r"valid/shards.table: there is no index of the valid split"):
        len(TokenSplit(tmp_path, "valid").index)
    shard = next((tmp_path / "train").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=rf"{shard.name}: \d+ bytes long, expected \d+ bytes"):
        list(TokenSplit(tmp_path, "train").samples())
    shard.unlink()
    with pytest.raises(DamagedError, match="missing"):
        list(TokenSplit(tmp_path, "train").samples())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_finite_batches_deal_every_sample_to_one_worker(tokenizer: Tokenizer, tmp_path: Path, world_size: int) -> None:
    summary = pack(tokenizer, [f"text {i} " * 9 for i in range(13)], tmp_path, validation_fraction=0)
    num_samples = summary.counts["train"].num_samples
    (everything,) = read_token_batches(TokenSplit(tmp_path, "train"), batch_size=num_samples)
    for max_samples in (None, 7):
        of_rank = [
            list(read_token_batches(TokenSplit(tmp_path, "train"), 2, rank, world_size, max_samples))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in of_rank}) == 1
        rows = [row for batches in of_rank for batch in batches for row in batch.targets_bt if row.ge(0).any()]
        wanted = everything.targets_bt[: max_samples or num_samples]
        assert sorted(row.tolist() for row in rows) == sorted(row.tolist() for row in wanted)
