"""The tokenizer and tokenize stages on a real Ray cluster: whole, resumed after a crash, and stopped by bad text."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.errors import UserError
from data.shards import TokenSplit, read_token_documents
from data.tokenizer import load_tokenizer
from pipelines.engine.stage import Resources, StageContext, StageInputs, StageNode, StageResult
from pipelines.stages import tasks
from pipelines.stages.tokenize import stage as stage_module
from pipelines.stages.tokenize.screening import verdicts
from pipelines.stages.tokenize.stage import TokenizeInputs, TokenizeOutput, TokenizeStage, TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStage, TokenizerStageConfig
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal, read_events

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEXTS = [f"document {i}: " + "some words, again and again. " * 20 for i in range(120)]


def context_at(folder: Path, name: str, content: str | None = None) -> StageContext:
    return StageContext(
        name=name,
        fingerprint="f" * 16,
        artifact=ArtifactDir.at(folder / name),
        journal=Journal(folder / "journal" / f"{name}.jsonl"),
        content=content,
    )


def write_corpus(folder: Path, texts: list[str]) -> Any:
    """Write a file of texts. Returns a source of it as a user writes one, for pydantic to read."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "files", "paths": [str(path)]}


def run_tokenizer(folder: Path, source: Any) -> StageNode[TokenizerStage]:
    config = TokenizerStageConfig(kind="tokenizer", source=source, vocab_size=400)
    context = context_at(folder, "tokenizer")
    output = TokenizerStage().run(config, StageInputs(), context)
    context.journal.close()
    result = StageResult("f" * 16, context.artifact, output)
    return StageNode("tokenizer", TokenizerStage(), config, StageInputs(), result)


def tokenize_config(source: Any) -> TokenizeStageConfig:
    return TokenizeStageConfig(
        kind="tokenize",
        needs=("tokenizer",),
        source=source,
        seq_len=64,
        slice_bytes=8192,
        validation_fraction=0.2,
        resources=Resources(num_workers=2),
    )


def run_tokenize(
    folder: Path, tokenizer: StageNode[TokenizerStage] | None, config: TokenizeStageConfig, content: str | None = None
) -> TokenizeOutput:
    with (context := context_at(folder, "tokens", content)).journal:
        return TokenizeStage().run(config, TokenizeInputs(tokenizer), context)


def metrics(folder: Path, name: str) -> list[tuple[int, float]]:
    events = [event for event, _ in read_events(folder / "journal" / "tokens.jsonl") if event["event"] == "metrics"]
    return [(event["step"], event["values"][name]) for event in events if name in event["values"]]


def test_stages_write_shards_and_a_crashed_run_redoes_only_unfinished_slices(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, TEXTS)
    tokenizer = run_tokenizer(tmp_path, source)
    assert tokenizer.output.backend == "tiktoken"
    config = tokenize_config(source)
    output = run_tokenize(tmp_path, tokenizer, config)
    shards = tmp_path / "tokens"

    assert output.num_train_documents + output.num_valid_documents == len(TEXTS)
    loaded = load_tokenizer(shards / "tokenizer")
    assert loaded.sha256 == tokenizer.output.sha256
    documents = [*read_token_documents(TokenSplit(shards, "train")), *read_token_documents(TokenSplit(shards, "valid"))]
    back = [loaded.decode(ids.tolist()).decode() for ids in documents]
    assert sorted(back) == sorted(TEXTS)
    assert metrics(tmp_path, "tokenize/slices_done")[-1] == (output.num_slices, output.num_slices)
    assert metrics(tmp_path, "tokenize/train_cut_documents") == [(0, output.num_train_cut_documents)]
    padded = output.num_train_samples * output.seq_len - output.num_train_tokens
    assert metrics(tmp_path, "tokenize/train_padded_tokens") == [(0, padded)]
    assert metrics(tmp_path, "tokenize/slices_total") == [(0, output.num_slices)]

    # As a SIGKILL leaves it: no index, one slice without its record and torn, the others finished.
    for file in ("train/index.json", "valid/index.json", "slices/00002.json"):
        (shards / file).unlink()
    finished = {path: path.stat().st_mtime_ns for path in shards.rglob("*.mds") if "slice-00002" not in str(path)}
    whole = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    torn = [shards / "train/slice-00002/shard.00000.mds", shards / "held_out/00002.parquet"]
    for path in torn:
        path.write_bytes(whole[path][:100])
    assert run_tokenize(tmp_path, tokenizer, config) == output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert {path: path.read_bytes() for path in torn} == {path: whole[path] for path in torn}

    # One that is killed while it packs the documents for validation.
    (torn_shard,) = shards.glob("valid/slice-00000/*.mds")
    torn_shard.write_bytes(b"torn")
    (shards / "validation_streams/00000.json").unlink()
    assert run_tokenize(tmp_path, tokenizer, config) == output
    assert torn_shard.read_bytes() == whole[torn_shard]
    steps = [step for step, _ in metrics(tmp_path, "tokenize/slices_done")]
    assert len(steps) == len(set(steps)), "no point is told twice"
    assert max(steps) == output.num_slices


def test_what_is_left_out_is_counted_tracked_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_corpus(tmp_path, [*TEXTS, "", ""])
    with open(tmp_path / "corpus.jsonl", "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    (tmp_path / "again.jsonl").symlink_to("corpus.jsonl")
    source["invalid_utf8"] = "skip_document"
    source["paths"] = [str(tmp_path / "corpus.jsonl"), str(tmp_path / "again.jsonl")]
    output = run_tokenize(tmp_path, run_tokenizer(tmp_path, source), tokenize_config(source))
    assert output.left_out == {"empty": 2, "invalid_utf8": 1}
    assert (output.summary() or "").endswith(
        "left out: 2 empty, 1 not valid UTF-8; names that lead to files already read: 1"
    )
    assert output.num_duplicate_files == 1
    assert output.num_train_documents + output.num_valid_documents == len(TEXTS)
    assert metrics(tmp_path, "tokenize/left_out_empty") == [(0, 2.0)]
    assert metrics(tmp_path, "tokenize/duplicate_files") == [(0, 1.0)]
    assert f"3 of {len(TEXTS) + 3} documents were left out: 2 empty, 1 not valid UTF-8." in caplog.text
    assert "1 names in the source lead to files that were already read" in caplog.text


def test_token_ids_need_no_tokenizer_and_bytes_bring_their_own(tmp_path: Path) -> None:
    np.arange(400, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    source: Any = {"kind": "tokens", "paths": [str(tmp_path / "ids.bin")], "vocab_size": 400, "document_tokens": 10}
    output = run_tokenize(tmp_path / "ids", None, tokenize_config(source))
    assert (output.vocab_size, output.eod_id, output.tokenizer_sha256, output.is_text) == (401, 400, None, False)
    assert output.num_train_documents + output.num_valid_documents == 40
    assert output.num_train_bytes == 0
    assert not (tmp_path / "ids/tokens/tokenizer").exists()
    assert not metrics(tmp_path / "ids", "tokenize/bytes_per_token")

    config = tokenize_config({**write_corpus(tmp_path, TEXTS), "kind": "bytes"})
    output = run_tokenize(tmp_path / "bytes", None, config.model_copy(update={"validation_fraction": 0.0}))
    assert output.is_text
    loaded = load_tokenizer(tmp_path / "bytes/tokens/tokenizer")
    documents = read_token_documents(TokenSplit(tmp_path / "bytes/tokens", "train"))
    assert b"".join(loaded.decode(ids.tolist()) for ids in documents) == (tmp_path / "corpus.jsonl").read_bytes()
    assert output.num_train_bytes == (tmp_path / "corpus.jsonl").stat().st_size


@pytest.mark.parametrize(("seq_len", "num_cut"), [(20, 40), (21, 0)])
def test_documents_of_a_task_that_do_not_fit_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seq_len: int, num_cut: int
) -> None:
    """Documents of 16 tokens, 4 answers and their end: a sequence as long as the document is one token too short."""
    task = {"kind": "mqar", "seq_len": 16, "num_pairs": 4, "num_queries": 4}
    config = tokenize_config({"kind": "synthetic", "num_documents": 40, "task": task})
    output = run_tokenize(tmp_path, None, config.model_copy(update={"seq_len": seq_len, "packing": "best_fit"}))
    assert output.num_train_cut_documents + output.num_valid_cut_documents == num_cut
    said = f"{num_cut} of 40 documents do not fit into a sequence of {seq_len} tokens"
    assert (said in caplog.text) is (num_cut > 0)


def test_filters_leave_documents_out_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(
        tmp_path, [*TEXTS, *TEXTS[:30], "tiny", "odd one out, of some length", "odd again, the second"]
    )
    (tmp_path / "of_mine.py").write_text("import helps_mine\n\ndef even(text):\n    return helps_mine.even(text)\n")
    (tmp_path / "helps_mine.py").write_text("def even(text):\n    return not text.startswith('odd')\n")
    (tmp_path / "exam.txt").write_text("Document 7")
    filters = [
        {"kind": "length", "min_characters": 5},
        {"kind": "exact_duplicates"},
        {"kind": "python", "call": "of_mine:even", "folder": str(tmp_path)},
        {"kind": "decontamination", "paths": ["exam.txt"], "ngram_words": 2},
    ]
    plain = tokenize_config(source)
    config = TokenizeStageConfig.model_validate({**plain.model_dump(), "filters": filters})
    monkeypatch.chdir(tmp_path)
    stage = TokenizeStage()
    content = stage.content_identity(config)
    assert set(content) == {"text", "texts of exam.txt", "source of of_mine", "source of helps_mine"}
    assert [path.name for path in stage.code_files(config)] == ["helps_mine.py", "of_mine.py"]
    assert stage.local_paths(config)[-1] == "exam.txt"

    tokenizer = run_tokenizer(tmp_path, source)
    output = run_tokenize(tmp_path, tokenizer, config)
    assert output.left_out == {"too_short": 1, "duplicate": 30, "predicate": 2, "contaminated": 1}
    shards = tmp_path / "tokens"
    assert len(np.load(shards / "comparisons/0.npy")) == 30
    assert not (shards / "comparisons/0").exists()

    told = [verdict.rejection.reason for verdict in verdicts(config, ArtifactDir.at(shards)) if verdict.rejection]
    assert Counter(told) == output.left_out

    (shards / "slices/00001.json").unlink()
    monkeypatch.setattr("pipelines.stages.tokenize.screening._compare", None)  # what it found is read again
    assert run_tokenize(tmp_path, tokenizer, config) == output


def test_bad_text_fails_the_stage_and_leaves_no_data_set(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, TEXTS)
    tokenizer = run_tokenizer(tmp_path, source)
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"body": "no text"}\n')
    with pytest.raises(UserError, match=rf"corpus.jsonl, line {len(TEXTS) + 1}: no field 'text'") as raised:
        run_tokenize(tmp_path, tokenizer, tokenize_config(source))
    assert "Traceback" not in str(raised.value)
    assert not list((tmp_path / "tokens").glob("*/index.json"))


def test_missing_files_are_a_user_error_before_anything_is_written() -> None:
    config = tokenize_config({"kind": "files", "paths": ["/nowhere/*.txt"]})
    with pytest.raises(UserError, match="no file matches"):
        TokenizeStage().content_identity(config)


def test_a_task_whose_worker_is_killed_is_started_again(tmp_path: Path) -> None:
    def dies_once(marker: Path) -> str:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert list(tasks.run_tasks(dies_once, [(tmp_path / "marker",)], Resources())) == ["done"]


def test_a_task_larger_than_every_machine_is_a_user_error() -> None:
    resources = Resources(cpus_per_worker=1000, placement_timeout_s=0.1)
    with pytest.raises(UserError, match="one worker asks for 1000 CPU, and the cluster has room for none"):
        list(tasks.run_tasks(str, [("never run",)], resources))


def test_text_that_changed_since_the_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, TEXTS)
    tokenizer = run_tokenizer(tmp_path, source)
    config = tokenize_config(source)
    content = TokenizeStage().content_identity(config)
    write_corpus(tmp_path, [text.replace("o", "u") for text in TEXTS])
    with pytest.raises(UserError, match=r"stages\.tokens: the files it reads have changed"):
        run_tokenize(tmp_path, tokenizer, config, content)
    assert not list((tmp_path / "tokens").rglob("*.mds"))
    training = TokenizerStageConfig(kind="tokenizer", source=source, vocab_size=400)
    context = context_at(tmp_path, "again", content)
    with context.journal, pytest.raises(UserError, match=r"stages\.again: the files it reads have changed"):
        TokenizerStage().run(training, StageInputs(), context)


def test_slices_of_text_that_changed_and_changed_back_are_not_reused(tmp_path: Path) -> None:
    """As a driver leaves it that dies while the text is another one for a moment."""
    source = write_corpus(tmp_path, TEXTS)
    tokenizer = run_tokenizer(tmp_path, source)
    config = tokenize_config(source)
    right = run_tokenize(tmp_path, tokenizer, config)
    shards = {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*.mds")}
    for path in shards:
        path.write_bytes(b"of another text")
    write_corpus(tmp_path, ["another"])
    write_corpus(tmp_path, TEXTS)
    assert run_tokenize(tmp_path, tokenizer, config) == right
    assert {path: path.read_bytes() for path in shards} == shards


def test_text_that_is_touched_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path, TEXTS)
    tokenizer = run_tokenizer(tmp_path, source)
    run_all = stage_module.write_slices

    def touched(*arguments: Any) -> Any:
        records = run_all(*arguments)
        write_corpus(tmp_path, TEXTS)
        return records

    monkeypatch.setattr(stage_module, "write_slices", touched)
    with pytest.raises(UserError, match="changed or touched while they were read"):
        run_tokenize(tmp_path, tokenizer, tokenize_config(source))
    assert not list((tmp_path / "tokens").glob("*/index.json"))
