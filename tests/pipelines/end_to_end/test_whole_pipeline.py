"""From raw text to the report through the command line, and everything a user then does with the run."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from pipelines.engine.lease import Lease
from pipelines.loading import load_pipeline
from pipelines.session import open_pipeline, run_config
from pipelines.stages.evaluate.stage import EvaluateOutput
from pipelines.tracking import replay
from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, write_pipeline

Pipeline = tuple[TinyPipeline, Finished]


def test_the_run_ends_with_its_figures_and_the_report(finished_pipeline: Pipeline) -> None:
    pipeline, finished = finished_pipeline
    assert "bits per byte" in finished.output
    assert "gzip -9" in finished.output
    report = pipeline.artifact("report") / "report.html"
    assert str(report) in finished.output.replace("\n", "")
    html = report.read_text()
    assert "Perplexity" in html
    assert html.count("<svg") == 1 + 3 * 6  # by position; six plots of metrics over steps, tokens and time
    assert f"<dt>run</dt><dd>{next((pipeline.storage / 'runs').iterdir()).name}</dd>" in html
    assert f"<dt>command</dt><dd>bmojo run {pipeline.file}</dd>" in html
    opened = pipeline.ask("open", "tiny", "--storage", str(pipeline.storage))
    assert opened.output == f"{report}\n"


def test_evaluation_agrees_with_what_training_saw(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    train, evaluate = pipeline.record("train")["output"], pipeline.record("evaluate")["output"]
    assert train["final_valid_loss"] < train["initial_valid_loss"]
    found = EvaluateOutput.model_validate(evaluate)
    loss, bits_per_byte = found.figure("text/loss"), found.figure("text/bits_per_byte")
    assert loss is not None
    assert bits_per_byte is not None
    assert loss.value == pytest.approx(train["final_valid_loss"], abs=0.2)  # training reads the first batches only
    assert loss.low is not None
    assert loss.low < loss.value
    (untrained,) = (one for one in found.results[0].references if one.name == "untrained")
    assert bits_per_byte.value < untrained.value
    (curve,) = found.results[1].curves
    assert curve.mark is not None
    assert curve.points[-1].x == 4 * curve.mark.x
    assert found.evaluated.step == 16


def test_the_same_command_again_reuses_every_stage(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    again = pipeline.run()
    assert again.code == 0, again.output
    assert again.output.count("reused") == 5
    assert "running ..." not in again.output


def test_a_change_of_evaluation_runs_evaluation_and_report_only(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    planned = pipeline.ask("plan", str(pipeline.file), "evaluate.measures.2.seed=1")
    table = [line.split() for line in planned.output.splitlines()[1:6]]
    assert [row[0] for row in table if row[2:3] == ["reuse"]] == ["tokenizer", "tokens", "train"]
    assert "evaluate   evaluate   run" in planned.output
    assert "report     report     run" in planned.output
    assert "measures.2.seed: 0 -> 1" in planned.output


def test_logging_and_resources_can_change_without_running_anything_again(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    planned = pipeline.ask("plan", str(pipeline.file), "train.log_every_steps=7", "tokens.resources.num_workers=1")
    assert planned.output.count(" reuse ") == 5


def test_status_and_list_know_the_run(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    status = pipeline.ask("status", "--storage", str(pipeline.storage))
    assert status.code == 0
    assert "SUCCEEDED" in status.output
    assert re.search(
        r"^tokens: \d+ documents for training \([\d,]+ tokens\), \d+ for validation \([\d,]+ tokens\); "
        r"cut: \d+ documents; padding: [\d.]+%; left out: none$",
        status.output,
        re.MULTILINE,
    )
    (page,) = pipeline.storage.glob("artifacts/report/report-*/report.md")
    assert re.search(r"## Data\n\n### tokens\n\n\| split \| documents .*\n.*\n\| training \| \d+ \|", page.read_text())
    listed = pipeline.ask("list", "--storage", str(pipeline.storage))
    assert "tiny-" in listed.output
    assert "5/5" in listed.output


@pytest.mark.ci
def test_generate_streams_text_and_is_repeatable(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    arguments = ("generate", "tiny", "--prompt", "ba", "--tokens", "12", "--storage", str(pipeline.storage))
    first, second = pipeline.bmojo(*arguments), pipeline.bmojo(*arguments)
    assert first.code == 0, first.output
    assert first.output.startswith("ba")
    assert first.output == second.output


def test_kernels_that_cannot_run_are_one_clear_screen(
    finished_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, _ = finished_pipeline
    monkeypatch.setenv("BMOJO_KERNELS", "fortran")
    finished = pipeline.bmojo("generate", "tiny", "--storage", str(pipeline.storage))
    assert finished.code == 1
    assert "kernel path 'fortran' does not exist; set BMOJO_KERNELS to one of" in finished.output.replace("\n", " ")
    assert "Traceback" not in finished.output


def test_resume_of_a_finished_run_reuses_it(finished_pipeline: Pipeline) -> None:
    pipeline, _ = finished_pipeline
    resumed = pipeline.bmojo("resume", "tiny", "--storage", str(pipeline.storage))
    assert resumed.code == 0, resumed.output
    assert resumed.output.count("reused") == 5


def test_mlflow_holds_a_parent_and_a_child_per_stage(finished_pipeline: Pipeline) -> None:
    import mlflow

    pipeline, _ = finished_pipeline
    client = mlflow.MlflowClient(f"sqlite:///{pipeline.storage}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'bmojo'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("bmojo.role") == "pipeline")
    children = {run.data.tags["bmojo.stage"]: run for run in runs if run is not parent}
    assert set(children) == {"tokenizer", "tokens", "train", "evaluate", "report"}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
    evaluated, trained = pipeline.record("evaluate")["output"], pipeline.record("train")["output"]
    found = EvaluateOutput.model_validate(evaluated).figures()
    assert {name: parent.data.metrics[name] for name in found} == found
    assert found["eval/bits_per_byte_low"] < found["eval/bits_per_byte"]
    assert parent.data.metrics["valid/loss"] == trained["final_valid_loss"]
    assert parent.data.metrics["train/tokens_per_s"] == trained["tokens_per_s"]
    assert parent.data.metrics["train/parameters"] == trained["num_params"]
    settings = parent.data.params
    assert (settings["train.max_steps"], settings["train.model.d_model"]) == ("16", "32")
    assert settings["train.model.pattern"] == "bmojo*2"
    assert "train.lr" in settings
    assert not any("resources" in name for name in settings)
    assert parent.data.tags["bmojo.overrides"] == "none"
    assert "cpp: float32 or float64 on the CPU" in children["train"].data.tags["bmojo.path.linear"]
    assert {child.info.run_name for child in children.values()} == {
        f"{parent.info.run_name}/{name}" for name in children
    }
    train = children["train"]
    assert train.data.params["model.d_model"] == "32"
    assert [point.step for point in client.get_metric_history(train.info.run_id, "train/loss")] == list(range(1, 17))
    assert children["tokens"].inputs.dataset_inputs
    assert train.inputs.dataset_inputs
    assert children["evaluate"].inputs.dataset_inputs
    names = {item.path for item in client.list_artifacts(children["report"].info.run_id)}
    assert {"report.html", "report.md", "report.json", "figures.json", "plots"} <= names


def write_lines(pipeline: TinyPipeline, lines: list[str]) -> None:
    (pipeline.folder / "corpus.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}', "{nonsense"], r"corpus\.jsonl.*line 2"),
        pytest.param([], "empty corpus", marks=pytest.mark.slow),
    ],
)
def test_a_bad_corpus_is_one_clear_screen(tmp_path: Path, lines: list[str], expected: str) -> None:
    pipeline = write_pipeline(tmp_path)
    write_lines(pipeline, lines)
    finished = pipeline.run()
    assert finished.code == 1, finished.output
    assert re.search(expected, finished.output, re.DOTALL)
    assert "Traceback" not in finished.output
    assert not list(pipeline.storage.glob("artifacts/*/*/record.json"))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}', '{"body": "b"}'], r"corpus\.jsonl.*'text'"),
        (['{"text": 3}'], r"corpus\.jsonl.*text"),
    ],
)
def test_a_bad_corpus_ends_the_run_and_leaves_nothing(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, lines: list[str], expected: str
) -> None:
    """In this process, on the cluster that the other tests share."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(replay, "_PATIENCE_S", 0.1)
    pipeline = write_pipeline(tmp_path)
    write_lines(pipeline, lines)
    failure = run_config(load_pipeline(pipeline.file)).failure
    assert failure is not None
    assert failure.exit_code == 1
    assert re.search(expected, failure.text)
    assert not list(pipeline.storage.glob("artifacts/*/*/record.json"))


@pytest.mark.ci
def test_a_missing_corpus_writes_nothing(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    finished = pipeline.run()
    assert finished.code == 1
    assert "corpus.jsonl" in finished.output
    assert not pipeline.storage.exists()


@pytest.mark.ci
def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    finished = pipeline.run(f"storage={tmp_path}/file/runs")
    assert finished.code == 1
    assert "file/runs" in finished.output.replace("\n", "")
    assert "Traceback" not in finished.output


def test_the_schema_is_valid_json(finished_pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline, _ = finished_pipeline
    assert pipeline.ask("schema", "-o", str(tmp_path / "schema.json")).code == 0
    assert "stages" in json.loads((tmp_path / "schema.json").read_text())["properties"]


@pytest.mark.ci
def test_resume_works_from_any_directory_and_refuses_another_run(
    finished_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative storage and relative paths mean what they meant when the run was started."""
    pipeline, _ = finished_pipeline
    monkeypatch.chdir(pipeline.folder)
    first = pipeline.bmojo("run", "tiny.yaml", "storage=runs")
    assert first.code == 0, first.output
    monkeypatch.chdir(tmp_path)
    resumed = pipeline.bmojo("resume", "--storage", str(pipeline.storage))
    assert resumed.code == 0, resumed.output
    assert f"in {pipeline.storage}" in resumed.output
    assert resumed.output.count("reused") == 5
    assert not list(tmp_path.iterdir()), "nothing was made here"
    corpus = pipeline.folder / "corpus.jsonl"
    before = corpus.read_bytes()
    try:
        corpus.write_bytes(before + b'{"text": "one more"}\n')
        refused = pipeline.bmojo("resume", "--storage", str(pipeline.storage))
    finally:
        corpus.write_bytes(before)
    assert refused.code == 1
    assert "cannot be resumed as it was" in refused.output
    assert "tokenizer: the content of the raw input" in refused.output
    assert pipeline.bmojo("resume", "--storage", str(pipeline.storage)).code == 0


@pytest.mark.ci
def test_a_storage_that_was_moved_still_generates(finished_pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline, _ = finished_pipeline
    moved = tmp_path / "elsewhere"
    shutil.copytree(pipeline.storage, moved)
    hidden = pipeline.storage.rename(pipeline.folder / "hidden")
    try:
        finished = pipeline.bmojo("generate", "--storage", str(moved), "--tokens", "4", "--temperature", "0")
    finally:
        hidden.rename(pipeline.storage)
    assert finished.code == 0, finished.output


@pytest.mark.ci
def test_plan_and_generate_say_who_is_at_work(finished_pipeline: Pipeline) -> None:
    """While another process makes a stage, it is running, not interrupted."""
    pipeline, _ = finished_pipeline
    override = "train.max_steps=24"
    planned = open_pipeline(load_pipeline(pipeline.file, [override]))
    stage = next(stage for stage in planned.plan() if stage.name == "train")
    relpath = f"leases/train-train-{stage.fingerprint.short}"
    with Lease.acquire(planned.storage, relpath, "x"):
        shown = pipeline.ask("plan", str(pipeline.file), override)
    assert shown.code == 0
    assert f"running now, by process {os.getpid()}" in shown.output
    assert "running now" not in pipeline.ask("plan", str(pipeline.file), override).output
