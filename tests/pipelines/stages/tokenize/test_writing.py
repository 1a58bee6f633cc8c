"""The tasks of tokenize on machines that share nothing but a store, and their records after damage and loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import DamagedError
from data import held_out
from data.config import FilesSource, PackingFields
from data.merging import check_slices, merge
from data.packing import ValidationStream, plan_validation
from data.records import SliceRecords, ValidationRecord
from data.shards import TokenSplit, read_token_documents
from data.sources import plan_slices
from pipelines.stages.tokenize import writing
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.tokenize.stored_tokenizer import StoredTokenizer
from pipelines.storage.artifact import ArtifactDir
from tests.data.corpora import jsonl
from tests.pipelines.stages.trained_run import tiny_tokenizer

TEXTS = [f"document {i}: " + "some words, again and again. " * 9 for i in range(60)]
FIELDS = PackingFields(seq_len=64, validation_fraction=0.3)


class Machines:
    """Machines that see the same text, and the same artifact in a store; each has a scratch folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        self._folder, self._monkeypatch, self._number = folder, monkeypatch, 0
        self.next()
        self.artifact = ArtifactDir.at(url)
        self.artifact.delete()
        tokenizer = tiny_tokenizer()
        tokenizer.save(folder / "tokenizers" / "tokenizer")
        self.tokenizer = StoredTokenizer(ArtifactDir.at(folder / "tokenizers"), tokenizer.sha256)
        (folder / "c.jsonl").write_bytes(jsonl(TEXTS))
        self.slices = plan_slices(FilesSource(kind="files", paths=(str(folder / "c.jsonl"),)), 2048)

    def next(self) -> None:
        """What follows happens on another machine."""
        self._number += 1
        self._monkeypatch.setenv("BMOJO_CACHE_DIR", str(self._folder / f"cache-{self._number}"))

    def write_slice(self, number: int) -> None:
        writing._tokenize_slice(self.slices[number], FIELDS, self.tokenizer, "", self.artifact)

    def records(self) -> SliceRecords:
        return writing.finished_slices(self.artifact, "", self.tokenizer.sha256)

    def streams(self) -> list[ValidationStream]:
        return plan_validation(self.records(), FIELDS)

    def finish(self) -> None:
        validation: list[ValidationRecord] = []
        for stream in self.streams():
            self.next()
            validation.append(writing._pack_validation(stream, FIELDS, self.artifact))
        check_slices(self.records(), FIELDS)
        merge(self.artifact.local, self.records(), validation, FIELDS)
        for split in ("train", "valid"):
            self.artifact.publish(f"{split}/shards.table")

    def documents(self) -> list[str]:
        tokenizer = tiny_tokenizer()
        splits: list[TokenSplit] = [token_split(self.artifact, split) for split in ("train", "valid")]  # type: ignore[arg-type]
        return [tokenizer.decode(ids.tolist()).decode() for split in splits for ids in read_token_documents(split)]


@pytest.fixture(params=["local", "store"])
def machines(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    url = str(tmp_path / "tokens") if request.param == "local" else "memory://bucket/tokens"
    return Machines(tmp_path, monkeypatch, url)


def test_every_task_may_run_on_another_machine(machines: Machines) -> None:
    for number in reversed(range(len(machines.slices))):
        machines.next()
        machines.write_slice(number)
    machines.next()
    machines.finish()
    machines.next()
    assert sorted(machines.documents()) == sorted(TEXTS)


def test_documents_put_aside_that_are_lost_or_damaged_are_named_with_what_to_do(machines: Machines) -> None:
    for number in range(len(machines.slices)):
        machines.write_slice(number)
    (stream,) = machines.streams()
    lost, damaged = (held_out.file_name(number) for number, _ in stream.slices[:2])
    machines.next()
    machines.artifact.delete(lost)
    with pytest.raises(DamagedError, match=rf"{lost}.*Delete .*/slices/{lost[9:14]}.json to have it written again"):
        writing._pack_validation(stream, FIELDS, machines.artifact)
    machines.write_slice(int(lost[9:14]))
    whole = machines.artifact.storage.read_bytes(f"{machines.artifact.relpath}/{damaged}")
    machines.artifact.storage.write_bytes_atomic(
        f"{machines.artifact.relpath}/{damaged}", whole[:50] + b"x" + whole[51:]
    )
    machines.next()
    with pytest.raises(DamagedError, match=rf"{damaged}: damaged.*Delete the record of its slice"):
        writing._pack_validation(stream, FIELDS, machines.artifact)
    machines.write_slice(int(damaged[9:14]))
    machines.next()
    machines.finish()
    assert sorted(machines.documents()) == sorted(TEXTS)
