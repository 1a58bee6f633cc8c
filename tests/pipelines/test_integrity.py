"""A flipped bit or a missing end in any file of finished stages: the readers' answer stays right, or an error names
the file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import DamagedError
from bmojo.checkpoint_io import load_pretrained, save_pretrained
from data.config import FilesSource, TokenizeFields
from data.errors import DataError
from data.shards import TokenSplit, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.engine.fingerprint import FingerprintParts
from pipelines.engine.records import StageRecord, read_record, write_record
from pipelines.engine.runs import Run
from pipelines.stages.models import load_model, load_tokenizer_of
from pipelines.stages.tokenize.writing import finished_slices
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.checkpoint import TrainingState
from pipelines.stages.train.pieces import Piece
from pipelines.storage import open_storage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import DAMAGED, Journal, read_events
from tests.data.here import tokenize_here
from tests.pipelines.made_runs import made_run
from tests.pipelines.stages.trained_run import TEXT, tiny_model, tiny_tokenizer

HISTORY = {"valid/loss": [[0, 6.25], [1, math.inf], [2, math.nan]]}


def record(kind: str, artifact: ArtifactDir) -> None:
    write_record(
        artifact,
        StageRecord(
            kind=kind, name=kind, fingerprint="f" * 64, config={"lr": 0.25}, inputs={},
            parts=FingerprintParts(kind=kind, code_version=1, config={}, inputs=(), content=None),
            output={"loss": 2.5, "worst": math.inf}, files=artifact.describe_files(),
            created_at="2026-01-01T00:00:00.000+00:00", duration_s=1.5, versions={}, git_commit=None,
        ),
    )  # fmt: skip


def state_of(step: int) -> TrainingState:
    return TrainingState(
        step=step, num_tokens=9, num_samples=4, optimizer_steps=step, num_workers=1, data={"a": 1}, train_loss=math.nan,
        initial_valid_loss=6.25, train_time_s=1.0, history={"valid/loss": [(0, 6.25), (1, math.inf), (2, -math.inf)]},
        versions={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished tokenizer, tokenize and train stages, a run and a journal."""
    folder = tmp_path_factory.mktemp("integrity")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer-0" / "tokenizer")
    record("tokenizer", ArtifactDir.at(folder / "tokenizer-0"))

    (folder / "text.txt").write_text(TEXT * 3)
    source = FilesSource(kind="files", paths=(str(folder / "text.txt"),))
    fields = TokenizeFields(source=source, seq_len=32, validation_fraction=0)
    tokens = ArtifactDir.at(folder / "tokens-0")
    tokenize_here(tokenizer, fields, tokens.local)
    tokenizer.save(tokens.local / "tokenizer")
    record("tokenize", tokens)

    train = ArtifactDir.at(folder / "train-0")
    save_pretrained(tiny_model("bmojo"), train.local / "model")
    train.write_json("history.json", HISTORY)
    entries = checkpoints.write_rank_files(
        train, 2, 0, 1, {"param/w": Piece(0, torch.arange(6.0))}, {"torch": torch.zeros(4, dtype=torch.uint8)}
    )
    checkpoints.complete(train, state_of(2), entries)
    record("train", train)

    made_run(open_storage(folder), "tiny-00000000", {"a": 1}, {"train": "train"})
    with Journal(folder / "train.000001.jsonl") as journal:
        journal.log_metrics(1, {"train/loss": 2.5})
    return folder


def stream(folder: Path) -> list[Any]:
    sources = [TokenSplit(folder, "train")]
    with TokenStream(sources, micro_batch_size=1, global_batch_size=1, order=StreamOrder(), worker=Worker()) as opened:
        batches = iter(opened)
        return [next(batches).tokens_bt.tolist() for _ in range(opened.num_samples)]


def in_order(folder: Path) -> list[Any]:
    return [batch.tokens_bt.tolist() for batch in read_token_batches(TokenSplit(folder, "train"), 4)]


def newest(folder: Path) -> Any:
    found = checkpoints.newest_complete(ArtifactDir.at(folder))
    return None if found is None else (repr(found.state), found.read("param/w", 0, 6).tolist(), found.rng(0))


def weights(model: Any) -> str:
    return repr((model.config, [(name, value.sum(dtype=torch.float64)) for name, value in model.state_dict().items()]))


def tokenizer_facts(tokenizer: Any) -> Any:
    return tokenizer.sha256, tokenizer.end_of_document


def fetched(artifact: str) -> Callable[[Path], Any]:
    return lambda root: (
        repr(read_record(ArtifactDir.at(root / artifact))) + str(ArtifactDir.at(root / artifact).fetch())
    )


def journal_events(root: Path) -> Any:
    """A damaged line is reported in its place, so that those after it are delivered."""
    events = [event for event, _ in read_events(root / "train.000001.jsonl")]
    for event in events:
        if event["event"] == DAMAGED:
            raise DamagedError(event["problem"])
    return events


Reader = Callable[[Path], Any]
READERS: dict[str, tuple[str, list[Reader]]] = {
    "tokenizer": ("tokenizer-0/tokenizer/tokenizer.json", [
        lambda root: tokenizer_facts(
            load_tokenizer_of(ArtifactDir.at(root / "train-0"), str(root / "tokenizer-0/tokenizer")))]),
    "tokenizer config": ("tokenizer-0/tokenizer/tokenizer_config.json", [
        lambda root: tokenizer_facts(
            load_tokenizer_of(ArtifactDir.at(root / "train-0"), str(root / "tokenizer-0/tokenizer")))]),
    "shard": ("tokens-0/train/slice-00000/shard.00000.mds", [
        lambda root: in_order(root / "tokens-0"),
        lambda root: stream(root / "tokens-0")]),
    "index": ("tokens-0/train/shards.table", [
        lambda root: in_order(root / "tokens-0"),
        fetched("tokens-0")]),
    "slice record": ("tokens-0/slices/00000.json", [
        lambda root: list(finished_slices(ArtifactDir.at(root / "tokens-0"), "", tiny_tokenizer().sha256))]),
    "tokenize record": ("tokens-0/record.json", [fetched("tokens-0")]),
    "train record": ("train-0/record.json", [fetched("train-0")]),
    "weights": ("train-0/model/model.safetensors", [
        lambda root: weights(load_model(ArtifactDir.at(root / "train-0"), "model")),
        lambda root: weights(load_pretrained(root / "train-0/model"))]),
    "model config": ("train-0/model/config.json", [
        lambda root: weights(load_model(ArtifactDir.at(root / "train-0"), "model")),
        lambda root: weights(load_pretrained(root / "train-0/model"))]),
    "model digests": ("train-0/model/digests.json", [
        lambda root: weights(load_model(ArtifactDir.at(root / "train-0"), "model")),
        lambda root: weights(load_pretrained(root / "train-0/model"))]),
    "history": ("train-0/history.json", [lambda root: ArtifactDir.at(root / "train-0").read_json("history.json")]),
    "event": ("runs/tiny-00000000/events/000001-000001.json", [
        lambda root: Run(open_storage(root), "tiny-00000000").info(),
        lambda root: Run(open_storage(root), "tiny-00000000").state()]),
    "journal": ("train.000001.jsonl", [journal_events]),
}  # fmt: skip
ERRORS = (DamagedError, DataError)


def attempt(reader: Reader, root: Path) -> tuple[str | None, str | None]:
    """The answer, or the message of an error of ours."""
    try:
        return repr(reader(root)), None
    except ERRORS as error:
        return None, str(error)


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_is_an_error_that_names_the_file_or_changes_nothing(kind: str, root: Path) -> None:
    relpath, readers = READERS[kind]
    path = root / relpath
    whole = path.read_bytes()
    right = [repr(reader(root)) for reader in readers]
    random_ = random.Random(kind)
    refused = 0
    num_flips = 24
    try:
        for _ in range(num_flips):
            damaged = bytearray(whole)
            damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
            path.write_bytes(damaged)
            for reader, expected in zip(readers, right, strict=True):
                found, message = attempt(reader, root)
                assert found == expected or (message is not None and path.name in message)
                refused += message is not None
        path.write_bytes(whole[: len(whole) // 2])
        if kind != "journal":  # its end may always be missing: a torn line is cut off
            for reader in readers:
                with pytest.raises(ERRORS, match=path.name):
                    reader(root)
    finally:
        path.write_bytes(whole)
    assert refused > num_flips * len(readers) // 2
    assert [repr(reader(root)) for reader in readers] == right


def test_damage_in_any_file_of_a_checkpoint_is_noticed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    right = repr(newest(root / "train-0"))
    random_ = random.Random(0)
    for path in sorted((root / "train-0/checkpoints/step-00000002").iterdir()):
        whole = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(whole)
            damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
            path.write_bytes(damaged)
            caplog.clear()
            found = newest(root / "train-0")
            assert repr(found) == right or (found is None and str(path) in caplog.text)
        path.write_bytes(whole)
    assert repr(newest(root / "train-0")) == right


def test_training_never_begins_at_step_0_if_all_checkpoints_are_damaged(root: Path) -> None:
    from pipelines.stages.train.launch import newest_checkpoint

    path = root / "train-0/checkpoints/step-00000002/state.json"
    whole = path.read_bytes()
    newest = newest_checkpoint(ArtifactDir.at(root / "train-0"))
    assert newest is not None
    assert newest.state.step == 2
    path.write_bytes(whole[:-5])
    with pytest.raises(DamagedError, match=r"train-0/checkpoints is damaged.*delete that folder"):
        newest_checkpoint(ArtifactDir.at(root / "train-0"))
    path.write_bytes(whole)
    assert newest_checkpoint(ArtifactDir.at(root / "tokens-0")) is None


def test_a_lost_file_of_a_finished_stage_is_an_error_that_names_it(root: Path) -> None:
    path = root / "train-0/model/config.json"
    kept = path.rename(path.with_suffix(".kept"))
    try:
        with pytest.raises(DamagedError, match=r"model/config.json: missing.*or delete .*train-0 and run again"):
            ArtifactDir.at(root / "train-0").fetch("model")
    finally:
        kept.rename(path)


def test_files_without_digests_are_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"format": 1, "kind": "train"}')
    with pytest.raises(DamagedError, match=r"record.json.*no digest.*earlier version.*Delete the directory"):
        read_record(ArtifactDir.at(tmp_path))


def test_non_finite_numbers_survive_every_file_and_all_of_it_is_strict_json(root: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = ArtifactDir.at(root / "train-0").read_json("history.json")["valid/loss"]
    assert [float(value) for _, value in stored][:2] == [6.25, math.inf]
    assert math.isnan(float(stored[2][1]))
    state = checkpoints.newest_complete(ArtifactDir.at(root / "train-0"))
    assert state is not None
    assert state.state.history == state_of(2).history
    assert math.isnan(state.state.train_loss)
    found = read_record(ArtifactDir.at(root / "train-0"))
    assert found is not None
    assert float(found.output["worst"]) == math.inf
    for path in (root / "train-0").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


def test_models_and_checkpoints_may_be_read_by_whom_the_umask_allows(root: Path) -> None:
    (root / "plain").touch()
    expected = (root / "plain").stat().st_mode
    files = [path for path in (root / "train-0").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode for path in files} == dict.fromkeys((path.name for path in files), expected)
