"""The tokenizer's training sample: whole documents from all over the source, about as much as asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data.config import FilesSource
from data.sampling import sample_texts

NUM_DOCUMENTS = 4000
TEXTS = [f"{i:05d} " + "word " * (20 + i * 7919 % 400) for i in range(NUM_DOCUMENTS)]  # 4 MB, each text its own number


def source(tmp_path: Path, suffix: str) -> FilesSource:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / f"corpus{suffix}"
    packed = {".jsonl": raw, ".jsonl.gz": gzip.compress(raw), ".jsonl.zst": zstandard.compress(raw)}
    path.write_bytes(packed[suffix])
    return FilesSource(kind="files", paths=(str(path),))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("sample_bytes", [60_000, 400_000])
def test_a_sample_is_whole_documents_spread_over_the_source(tmp_path: Path, suffix: str, sample_bytes: int) -> None:
    texts = list(sample_texts(source(tmp_path, suffix), sample_bytes))
    assert set(texts) <= set(TEXTS)
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) == pytest.approx(sample_bytes, rel=0.2)
    numbers = [int(text[:5]) for text in texts]
    assert numbers == sorted(numbers)
    if suffix != ".jsonl":  # one slice: drawn from all of it, not from its head
        per_quarter = [
            sum(i * NUM_DOCUMENTS // 4 <= n < (i + 1) * NUM_DOCUMENTS // 4 for n in numbers) for i in range(4)
        ]
        assert min(per_quarter) > 0.5 * len(numbers) / 4
    assert numbers[-1] > 0.75 * NUM_DOCUMENTS > 0.25 * NUM_DOCUMENTS > numbers[0]
    assert texts == list(sample_texts(source(tmp_path, suffix), sample_bytes))


def test_a_source_smaller_than_the_sample_is_taken_whole_and_in_order(tmp_path: Path) -> None:
    assert list(sample_texts(source(tmp_path, ".jsonl"), 1 << 30)) == TEXTS


def test_documents_longer_than_their_share_are_taken_whole(tmp_path: Path) -> None:
    texts = [f"{i}" * 50_000 for i in range(10)] * 8
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = list(sample_texts(FilesSource(kind="files", paths=(str(path),)), 200_000))
    assert set(found) <= set(texts)
    assert 4 <= len(found) <= 5


def test_many_small_slices_give_documents_and_not_pieces_of_them(tmp_path: Path) -> None:
    """The share of a slice is smaller than any of its documents."""
    for i in range(30):
        lines = "".join(json.dumps({"text": f"{i:02d}-{j:03d} " + "x" * 4000}) + "\n" for j in range(300))
        (tmp_path / f"{i:02d}.jsonl").write_text(lines)
    texts = list(sample_texts(FilesSource(kind="files", paths=(str(tmp_path / "*.jsonl"),)), 50_000))
    assert all(len(text) == 4007 for text in texts)
    assert 10 <= len(texts) <= 14
    assert len({text[:2] for text in texts}) >= 10
