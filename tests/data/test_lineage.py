"""A sample's documents, by the table alone, are those whose text its tokens decode to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DamagedError
from data.config import FilesSource, Packing, TokenizeFields
from data.index import folder_name
from data.lineage import DOCUMENTS_FILE, all_documents, documents_of, place_of
from data.records import SPLITS
from data.shards import TokenSplit, read_stretch
from data.tokenizer import Tokenizer
from tests.data.here import Tokenized, tokenize_here


def tokenized(
    tokenizer: Tokenizer, folder: Path, texts: list[str], seq_len: int, packing: Packing, slice_bytes: int = 1024
) -> Tokenized:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = TokenizeFields(
        source=FilesSource(kind="files", paths=(str(path),)),
        seq_len=seq_len,
        packing=packing,
        slice_bytes=slice_bytes,
        shard_bytes=4096,
        validation_fraction=0.3,
    )
    return tokenize_here(tokenizer, fields, folder)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=5, max_size=20),
    seq_len=st.integers(4, 120),
    packing=st.sampled_from(["stream", "best_fit"]),
)
def test_a_document_is_read_at_its_place(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    packing: Packing,
) -> None:
    folder = tmp_path_factory.mktemp("places")
    texts = [f"{i}: " + f"word{i} " * length for i, length in enumerate([*lengths, *range(1, 12)])]
    texts += [f"long {i} " * 200 for i in range(8)]
    tokenized(tokenizer, folder, texts, seq_len, packing)
    source = (folder / "corpus.jsonl").read_bytes()
    read = []
    for split in SPLITS:
        tokens = TokenSplit(folder, split)
        documents = all_documents(tokens)
        assert split == "valid" or len(np.unique(tokens.index.folders)) > 1
        for number, (name, place) in enumerate(zip(documents.ids, documents.place_n.tolist(), strict=True)):
            end = place + int(documents.num_tokens_n[number])
            inputs_t, targets_t = read_stretch(tokens, place, end + 1)
            assert inputs_t[0] == targets_t[-1] == tokens.index.format.eod_id
            assert (inputs_t[1:] == targets_t[:-1]).all()
            text = tokenizer.decode(targets_t[:-1])
            assert text == json.loads(source[int(name.rpartition(":")[2]) :].splitlines()[0])["text"].encode()
            assert documents.num_bytes_n[number] == len(text)
            assert (documents.of_places(np.array([place, end])) == number).all()
            read.append(text.decode())
    assert sorted(read) == sorted(texts)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=5, max_size=20),
    seq_len=st.integers(4, 120),
    packing=st.sampled_from(["stream", "best_fit"]),
)
def test_every_target_is_traced_to_its_document_and_bytes(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    packing: Packing,
) -> None:
    folder = tmp_path_factory.mktemp("lineage")
    texts = [f"{i}: " + f"word{i} " * length for i, length in enumerate([*lengths, *range(1, 12)])]
    summary = tokenized(tokenizer, folder, texts, seq_len, packing).summary
    source = (folder / "corpus.jsonl").read_bytes()
    for split in SPLITS:
        tokens = TokenSplit(folder, split)
        found: list[str] = []
        for number, sample in enumerate(tokens.samples()):
            parts = documents_of(tokens, number)
            assert parts[0].targets.start == 0
            assert parts[-1].targets.stop == len(sample["tokens"]) - 1
            for part in parts:
                assert part.start is not None
                line = source[part.start : part.end]
                assert part.id == f"{folder / 'corpus.jsonl'}:{part.start}"
                (ids,) = tokenizer.encode_batch([json.loads(line)["text"]])
                assert part.num_tokens == len(ids)
                whole = [*ids.tolist(), tokenizer.eod_id]
                targets = sample["tokens"][1:][part.targets.start : part.targets.stop]
                assert targets.tolist() == whole[part.tokens.start : part.tokens.stop]
                found += [part.id] * (part.tokens.start == 0)
        assert len(found) == len(set(found)) == summary.counts[split].num_documents


def test_a_place_names_shard_and_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenized(tokenizer, tmp_path, [f"text {i} " * 400 for i in range(60)], 16, "stream", slice_bytes=1 << 16)
    tokens = TokenSplit(tmp_path, "train")
    expected = [
        (tokens.index.entry(shard).name, i, int(tokens.index.folders[shard]))
        for shard in range(len(tokens.index))
        for i in range(tokens.index.entry(shard).num_samples)
    ]
    assert len({folder for _, _, folder in expected}) > 2
    assert len(tokens.index) > len({folder for _, _, folder in expected})
    of_folder: dict[int, int] = {}
    for sample, (name, in_shard, folder) in enumerate(expected):
        place = place_of(tokens.index, sample)
        assert place == (name, in_shard, folder, of_folder.setdefault(folder, 0))
        of_folder[folder] += 1


def test_records_hold_the_digests_of_tables_and_damage_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = tokenized(tokenizer, tmp_path, [f"text {i} " * 40 for i in range(60)], 16, "stream")
    for record in done.slices:
        table = tmp_path / "train" / folder_name(record.index) / DOCUMENTS_FILE
        if record.train:
            assert hashlib.sha256(table.read_bytes()).hexdigest() == record.train.documents_sha256
    assert done.slices[0].train
    table = tmp_path / "train" / folder_name(0) / DOCUMENTS_FILE
    raw = np.frombuffer(table.read_bytes(), np.uint8).copy()
    raw[40] ^= 1
    table.write_bytes(raw.tobytes())
    with pytest.raises(DamagedError, match=r"documents.parquet: missing or damaged"):
        documents_of(TokenSplit(tmp_path, "train"), 0)
