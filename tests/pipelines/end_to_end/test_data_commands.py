"""`bmojo data` and `bmojo lineage` on a run whose documents are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from base.errors import UserError
from data.shards import TokenSplit
from pipelines.api.lineage import lineage
from pipelines.api.tokens import show_samples, statistics, tokens_artifact, verify
from pipelines.api.verdicts import verdicts
from pipelines.engine.runs import Run, find_run
from pipelines.storage import open_storage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline
from tests.pipelines.made_runs import made_run

pytestmark = pytest.mark.ci

Pipeline = tuple[TinyPipeline, Finished]
GLOBAL_BATCH, SEQ_LEN = 8, 64


@pytest.fixture(scope="module")
def run(finished_pipeline: Pipeline) -> Run:
    return find_run(open_storage(str(finished_pipeline[0].storage)), "tiny")


@pytest.fixture(scope="module")
def tokens(run: Run) -> ArtifactDir:
    return tokens_artifact(run, "tokens")


def documents(pipeline: TinyPipeline) -> dict[tuple[int, int], str]:
    """The documents of the corpus by their bytes in the file."""
    found, position = {}, 0
    for line in (pipeline.folder / "corpus.jsonl").read_bytes().splitlines(keepends=True):
        found[position, position + len(line)] = json.loads(line)["text"]
        position += len(line)
    return found


def test_samples_are_the_text_of_the_documents_they_name(finished_pipeline: Pipeline, tokens: ArtifactDir) -> None:
    texts = documents(finished_pipeline[0])
    written: dict[tuple[int, int], str] = {}
    count = TokenSplit(tokens.local, "train").index.counts.num_samples
    for sample in show_samples(tokens, "train", range(count)):
        assert sum(len(piece.tokens) for piece in sample.pieces) + sample.num_padded == SEQ_LEN
        for piece in sample.pieces:
            assert piece.first_byte is not None
            assert piece.end_byte is not None
            assert piece.num_tokens == len(piece.tokens)
            place = piece.first_byte, piece.end_byte
            written[place] = written.get(place, "") + "".join(piece.tokens)
    assert len(written) == finished_pipeline[0].record("tokenize")["output"]["num_train_documents"]
    for place, text in written.items():
        assert text == texts[place] + "<|endoftext|>"


def test_statistics_add_up(finished_pipeline: Pipeline, tokens: ArtifactDir) -> None:
    output = finished_pipeline[0].record("tokenize")["output"]
    for found in statistics(tokens):
        assert found.num_documents == output[f"num_{found.split}_documents"]
        assert sum(each.num_documents for each in found.lengths) == found.num_documents
        assert found.padded_share == pytest.approx(1 - found.num_tokens / (found.num_samples * SEQ_LEN))
        quantiles = list(found.document_tokens.values())
        assert quantiles == sorted(quantiles)
        assert found.lengths[0].at_least <= quantiles[0]
        assert quantiles[-1] < found.lengths[-1].less_than


def test_every_step_names_other_samples_of_the_epoch(run: Run, tokens: ArtifactDir) -> None:
    count = TokenSplit(tokens.local, "train").index.counts.num_samples
    seen = [sample for step in range(1, 17) for sample in lineage(run, "train", step).samples]
    assert len(seen) == 16 * GLOBAL_BATCH
    assert len({sample.sample for sample in seen}) == min(count, 16 * GLOBAL_BATCH)
    shown = next(show_samples(tokens, "train", [seen[0].sample]))
    assert (shown.shard, shown.in_shard) == (seen[0].shard, seen[0].in_shard)
    assert [piece.document for piece in shown.pieces] == [part.document for part in seen[0].documents]


def test_what_is_not_there_is_told(run: Run, tokens: ArtifactDir) -> None:
    with pytest.raises(UserError, match="Stage train has no step 17: its steps are 1 to 16"):
        lineage(run, "train", 17)
    with pytest.raises(UserError, match=r"is a tokenize stage, expected a train stage\. This run's: train"):
        lineage(run, "tokens", 1)
    with pytest.raises(UserError, match=r"is a train stage, expected a tokenize stage\. This run's: tokens"):
        tokens_artifact(run, "train")
    with pytest.raises(UserError, match=r"no sample 1000000: its samples are 0 to \d+"):
        next(show_samples(tokens, "train", [10**6]))


def test_verify_names_each_damaged_file(tokens: ArtifactDir, tmp_path: Path) -> None:
    copy = ArtifactDir.at(shutil.copytree(tokens.local, tmp_path / "tokens-0"))
    assert [checked.problem for checked in verify(copy) if checked.problem] == []
    shard = next((copy.local / "train").rglob("*.mds"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    table = next((copy.local / "valid").rglob("documents.parquet"))
    table.write_bytes(table.read_bytes()[:-1])
    problems = {checked.name: checked.problem for checked in verify(copy) if checked.problem}
    assert sorted(problems) == sorted(str(path.relative_to(copy.local)) for path in (shard, table))


def test_the_commands_say_the_same(finished_pipeline: Pipeline, run: Run, tokens: ArtifactDir) -> None:
    pipeline, _ = finished_pipeline
    storage = ("--storage", str(pipeline.storage))
    found = json.loads(pipeline.ask("lineage", "--step", "3", "--json", *storage).output)
    assert found == lineage(run, "train", 3).model_dump(mode="json")
    shown = pipeline.ask("data", "show", "tokens", "--sample", "2", *storage).output
    first = next(show_samples(tokens, "train", [2]))
    assert first.shard in shown
    assert "".join(first.pieces[0].tokens).splitlines()[0] in shown
    assert "are as they were written" in pipeline.ask("data", "verify", "tokens", *storage).output
    assert "tokens per document: min: " in pipeline.ask("data", "stats", "tokens", *storage).output


def test_filters_say_why(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": text}) for text in ("short", "a longer text " * 9, "a longer text " * 9, "another " * 9)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    stage = {
        "kind": "tokenize",
        "needs": ["tokenizer"],
        "source": {"kind": "files", "paths": ["corpus.jsonl"]},
        "seq_len": 8,
        "filters": [{"kind": "length", "min_characters": 20}, {"kind": "exact_duplicates"}],
    }
    storage = open_storage(str(tmp_path / "runs"))
    kinds = {"tokens": "tokenize", "plain": "tokenize", "train": "train"}
    stages = {"tokens": stage, "plain": {**stage, "filters": []}}
    run = made_run(storage, "f-00000000", {"stages": stages}, kinds, base_dir=str(tmp_path))
    found = list(verdicts(run, "tokens"))
    assert [(one.kept, one.filter, one.reason) for one in found] == [
        (False, "length", "too_short"),
        (True, None, None),
        (False, "exact_duplicates", "duplicate"),
        (True, None, None),
    ]
    assert found[0].why == "5 characters, at least 20 are asked for"
    assert found[0].document == f"{tmp_path}/corpus.jsonl:0"
    with pytest.raises(UserError, match="Stage plain has no filters"):
        next(verdicts(run, "plain"))
    with pytest.raises(UserError, match=r"is a train stage, expected a tokenize stage\. This run's: tokens, plain"):
        next(verdicts(run, "train"))
