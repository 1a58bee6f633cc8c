"""A gate on a whole pipeline, and an evaluation of a checkpoint, on a copy of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest

from pipelines.stages.evaluate.stage import EvaluateOutput
from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline

REASON = "text/loss is "
GATE = "evaluate.gate={figures: {text/loss: {max: 0.5}}}"
NEW_REPORT = "report.title=gated"  # so that something is left to do


@pytest.fixture
def pipeline(finished_pipeline: tuple[TinyPipeline, Finished], tmp_path: Path) -> TinyPipeline:
    done, _ = finished_pipeline
    own = TinyPipeline(tmp_path)
    own.file.write_text(done.file.read_text().replace(str(done.storage), str(own.storage)))
    shutil.copytree(done.storage, own.storage)
    return own


@pytest.mark.ci
def test_a_closed_gate_stops_the_pipeline_and_says_why_everywhere(pipeline: TinyPipeline) -> None:
    stopped = pipeline.run(GATE, NEW_REPORT)
    assert stopped.code == 3, stopped.output
    assert "STOPPED in" in stopped.output
    assert f"error: gate of evaluate: {REASON}" in stopped.output
    assert "above its max of 0.5" in stopped.output.replace("\n", " ")
    status = pipeline.ask("status", "tiny", "--storage", str(pipeline.storage)).output
    assert f"evaluate: gate closed: {REASON}" in status
    assert "STOPPED" in status
    why = pipeline.ask("why", "tiny", "report", "--storage", str(pipeline.storage)).output
    assert "It is not run, because the gate of evaluate is closed." in why
    client = mlflow.MlflowClient(f"sqlite:///{pipeline.storage}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'bmojo'")
    newest_last = reversed(client.search_runs([experiment.experiment_id]))
    runs = {run.data.tags.get("bmojo.stage", "all"): run for run in newest_last}
    assert runs["evaluate"].data.tags["bmojo.gate"].startswith(REASON)
    assert runs["all"].data.tags["bmojo.gate.evaluate"].startswith(REASON)
    assert runs["all"].data.tags["bmojo.error"].startswith(f"gate of evaluate: {REASON}")
    assert (runs["all"].info.status, runs["all"].data.tags["bmojo.status"]) == ("KILLED", "STOPPED")


@pytest.mark.slow
def test_a_gate_may_fail_its_stage_and_another_gate_opens(pipeline: TinyPipeline) -> None:
    failed = pipeline.run(GATE, NEW_REPORT, "evaluate.gate.action=fail")
    assert failed.code == 1, failed.output
    assert f"error: stage evaluate: gate: {REASON}" in failed.output

    opened = pipeline.run("evaluate.gate={figures: {text/loss: {max: 50}}}", NEW_REPORT)
    assert opened.code == 0, opened.output
    assert opened.output.count("reused") == 4


def test_figures_that_no_measure_finds_are_refused_by_plan(pipeline: TinyPipeline) -> None:
    planned = pipeline.ask("plan", str(pipeline.file), "evaluate.gate={figures: {text/los: {max: 1}}}")
    assert planned.code == 1
    assert "Did you mean 'text/loss'?" in planned.output


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_beside_the_final_model(pipeline: TinyPipeline) -> None:
    refused = pipeline.run("evaluate.step=4")
    assert refused.code == 1
    text = refused.output.replace("\n", " ")
    assert "found 4, but stage 'train' keeps no checkpoint of that step. It keeps: 12, 16; its final" in text
    earlier = pipeline.run("evaluate.step=12")
    assert earlier.code == 0, earlier.output
    losses = {}
    for record in sorted((pipeline.storage / "artifacts" / "evaluate").glob("*/results.json")):
        output = EvaluateOutput.model_validate_json(_without_digest(record))
        loss = output.figure("text/loss")
        assert loss is not None
        losses[output.evaluated.step] = loss.value
    assert set(losses) == {12, 16}
    assert losses[12] > losses[16]


def _without_digest(path: Path) -> str:
    return json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"})
