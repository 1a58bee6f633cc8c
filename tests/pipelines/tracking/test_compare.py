"""Runs side by side in MLflow: what the run of a whole pipeline itself shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from base.config import NOT_IN_FINGERPRINT
from base.errors import UserError
from pipelines.cli.running import ConsoleObserver
from pipelines.engine.graph import stage_graph
from pipelines.engine.headline import settings_of
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.provenance import machine, user_name
from pipelines.engine.records import read_record
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Status
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import (
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.storage import Storage, open_storage
from pipelines.supervisor import ProgressPipe
from pipelines.tracking.mlflow.target import MlflowTarget
from pipelines.tracking.replay import RUN_JOURNAL, Replay
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions, sync
from tests.pipelines.engine.counting_pipeline import NoCluster
from tests.pipelines.tracking.mlflow_server import client


class FitConfig(StageConfig):
    kind: Literal["fit"] = "fit"
    lr: float = 0.1
    shape: dict[str, int] = Field(default={"width": 8})
    workers: int = Field(1, json_schema_extra=NOT_IN_FINGERPRINT)


class FitOutput(StageOutput):
    loss: float
    speed: float

    def figures(self) -> dict[str, float]:
        return {"fit/loss": self.loss, "fit/speed": self.speed}


class FitStage(Stage[FitConfig, StageInputs, FitOutput]):
    code_version = 1

    def __init__(self) -> None:
        self.speed = 1.0

    def run(self, config: FitConfig, inputs: StageInputs, context: StageContext) -> FitOutput:
        context.journal.log_metrics(0, {"fit/loss": 1.0})
        return FitOutput(loss=config.lr / 2, speed=self.speed)


class ShowConfig(StageConfig):
    kind: Literal["show"] = "show"
    words: str = "all"
    fail: bool = Field(False, json_schema_extra=NOT_IN_FINGERPRINT)


@dataclass(frozen=True)
class ShowInputs(StageInputs):
    fits: tuple[StageNode[FitStage], ...] = ()


class ShowStage(Stage[ShowConfig, ShowInputs, StageOutput]):
    code_version = 1

    def run(self, config: ShowConfig, inputs: ShowInputs, context: StageContext) -> StageOutput:
        if config.fail:
            raise UserError("nothing to show")
        return StageOutput()


def run_fits(
    storage: Storage,
    target: MlflowTarget,
    fits: dict[str, FitConfig],
    fit_stage: FitStage | None = None,
    fail: bool = False,
    overrides: tuple[str, ...] | None = None,
    drain_s: float = 60,
) -> RunResult:
    stages = {**fits, "show": ShowConfig(needs=tuple(fits), fail=fail)}
    pipeline = Pipeline("p", stage_graph(stages, (fit_stage or FitStage(), ShowStage())), storage, overrides=overrides)
    options = TrackingOptions((target,), system_metrics=False, drain_s=drain_s)
    return run_pipeline(pipeline, options, NoCluster(), observer=ConsoleObserver(None, ProgressPipe()))


def parents(target: MlflowTarget, order: str = "attributes.start_time ASC") -> list[Any]:
    experiment = client(target).get_experiment_by_name(target.experiment).experiment_id
    return list(client(target).search_runs([experiment], "tags.`bmojo.role` = 'pipeline'", order_by=[order]))


def figures(parent: Any) -> dict[str, float]:
    """The results of a run."""
    return without_costs(parent.data.metrics)


def without_costs(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without what stages took."""
    return {name: value for name, value in metrics.items() if not name.startswith("stages/")}


@pytest.fixture
def own(target: MlflowTarget, tmp_path: Path) -> MlflowTarget:
    """An experiment of this test's own."""
    return replace(target, experiment=tmp_path.name)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


@pytest.mark.ci
def test_the_table_of_runs_holds_settings_and_figures_side_by_side(storage: Storage, own: MlflowTarget) -> None:
    run_fits(storage, own, {"first": FitConfig(lr=0.2, workers=7)})
    run_fits(storage, own, {"second": FitConfig(lr=0.1)})
    best, other = parents(own, "metrics.`fit/loss` ASC")
    assert (best.data.params, other.data.params) == (
        {"fit.lr": "0.1", "fit.shape.width": "8", "show.words": "all"},
        {"fit.lr": "0.2", "fit.shape.width": "8", "show.words": "all"},
    )
    assert (figures(best), figures(other)) == (
        {"fit/loss": 0.05, "fit/speed": 1.0},
        {"fit/loss": 0.1, "fit/speed": 1.0},
    )
    assert best.info.run_name != other.info.run_name
    assert len(client(own).search_runs(best.info.experiment_id, "params.`fit.lr` = '0.2'")) == 1


@pytest.mark.ci
def test_the_table_of_runs_holds_what_stages_took_and_what_changed(storage: Storage, own: MlflowTarget) -> None:
    first = run_fits(storage, own, {"first": FitConfig(lr=0.2)}).run
    run_fits(storage, own, {"first": FitConfig(lr=0.1)}, fail=True)
    run_fits(storage, own, {"first": FitConfig(lr=0.1)})
    one, other = parents(own)
    took = {name for name in one.data.metrics if name.startswith("stages/duration_s/")}
    assert took == {"stages/duration_s/fit", "stages/duration_s/show"}
    assert all(one.data.metrics[name] >= 0 for name in took)
    assert {name: one.data.metrics[name] for name in ("stages/attempts/fit", "stages/attempts/show")} == {
        "stages/attempts/fit": 1,
        "stages/attempts/show": 1,
    }
    assert (other.data.metrics["stages/attempts/fit"], other.data.metrics["stages/attempts/show"]) == (1, 2), (
        "of all its drives"
    )
    assert not [name for name in one.data.tags if name.startswith("bmojo.changed.")], "there was none before"
    assert other.data.tags["bmojo.changed.first"] == "lr: 0.2 -> 0.1", "kept by the drive that reuses it"
    assert other.data.tags["bmojo.changed.show"].startswith("input first: ")
    assert one.data.tags["bmojo.cluster"] == "1 x (8 CPU, 0 GPU)"
    assert one.data.tags["bmojo.run_dir"] == first.url
    assert one.data.tags["bmojo.storage"] == storage.url
    assert one.data.tags["bmojo.ray_job"] == "none"
    assert "bmojo.ray_job_url" not in one.data.tags
    assert first.url in one.data.tags["mlflow.note.content"]


def test_a_run_of_a_submitted_job_links_to_its_page(
    storage: Storage, own: MlflowTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"metadata": {"job_submission_id": "compare-12345678"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(settings))
    monkeypatch.setenv("BMOJO_DASHBOARD", "http://head:8265/")
    run_fits(storage, own, {"fit": FitConfig()})
    (parent,) = parents(own)
    page = "http://head:8265/#/jobs/compare-12345678"
    assert parent.data.tags["bmojo.ray_job_url"] == page
    assert f"[compare-12345678]({page})" in parent.data.tags["mlflow.note.content"]


def test_a_users_own_description_is_kept(storage: Storage, own: MlflowTarget) -> None:
    run_fits(storage, own, {"fit": FitConfig()}, fail=True)
    client(own).set_tag(parents(own)[0].info.run_id, "mlflow.note.content", "my best run")
    run_fits(storage, own, {"fit": FitConfig()})
    (parent,) = parents(own)
    assert parent.data.tags["mlflow.note.content"] == "my best run"
    children = client(own).search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(children) == 2, "the same child for all attempts at a stage"


def test_stages_of_one_kind_are_told_apart(storage: Storage, own: MlflowTarget) -> None:
    run_fits(storage, own, {"fit": FitConfig(lr=0.2), "narrow": FitConfig(shape={"width": 4})})
    (parent,) = parents(own)
    assert parent.data.params == {
        "fit.lr": "0.2",
        "fit.shape.width": "8",
        "narrow.lr": "0.1",
        "narrow.shape.width": "4",
        "show.words": "all",
    }
    assert figures(parent) == {
        "fit/fit/loss": 0.1,
        "fit/fit/speed": 1.0,
        "narrow/fit/loss": 0.05,
        "narrow/fit/speed": 1.0,
    }


def test_a_stage_named_as_another_ones_kind_hides_nothing(storage: Storage) -> None:
    stages = {"show": FitConfig(), "fit": FitConfig(lr=0.2), "last": ShowConfig(needs=("fit",), words="none")}
    planned = Pipeline("p", stage_graph(stages, (FitStage(), ShowStage())), storage).plan()
    assert settings_of(planned) == {
        "show.lr": 0.1,
        "show.shape.width": 8,
        "fit.lr": 0.2,
        "fit.shape.width": 8,
        "last.words": "none",
    }


def test_runs_say_whose_they_are_and_children_are_named_after_their_run(storage: Storage, own: MlflowTarget) -> None:
    given = ("fit.lr=0.2", "fit.lr=0.3", "tracking.uri=http://me:hunter22@host", "hub.api_key=abc", "a=b c")
    result = run_fits(storage, own, {"fit": FitConfig()}, overrides=given)
    (parent,) = parents(own)
    tags = parent.data.tags
    assert tags["mlflow.user"] == user_name()
    assert tags["bmojo.driver.cpu"] == machine()["cpu"]
    assert tags["bmojo.driver.cpu"].endswith(f", {os.cpu_count()} cores")
    assert tags["bmojo.driver.gpus"] == machine()["gpus"]
    assert tags["bmojo.overrides"] == "fit.lr=0.3 'tracking.uri=http://***@host' 'hub.api_key=***' 'a=b c'"
    assert result.run.info().overrides == ("fit.lr=0.3", "tracking.uri=http://***@host", "hub.api_key=***", "a=b c")
    record = read_record(result.stages["fit"].artifact)
    assert record is not None
    assert record.hardware == machine()
    children = client(own).search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {child.info.run_name for child in children} == {f"{result.run.run_id}/fit", f"{result.run.run_id}/show"}
    assert {child.data.tags["mlflow.user"] for child in children} == {user_name()}


@pytest.mark.ci
def test_a_resume_keeps_the_overrides_and_a_run_without_any_says_so(storage: Storage, own: MlflowTarget) -> None:
    run_fits(storage, own, {"fit": FitConfig()}, fail=True, overrides=("fit.lr=0.1",))
    run_fits(storage, own, {"fit": FitConfig()}, fail=True, overrides=None)
    assert parents(own)[0].data.tags["bmojo.overrides"] == "fit.lr=0.1"
    run_fits(storage, own, {"fit": FitConfig()}, overrides=())
    assert parents(own)[0].data.tags["bmojo.overrides"] == "none"


@pytest.mark.ci
def test_figures_of_a_run_that_failed_later_are_there_once_and_those_made_again_are_the_latest(
    storage: Storage, own: MlflowTarget
) -> None:
    stage = FitStage()
    result = run_fits(storage, own, {"fit": FitConfig()}, stage, fail=True)
    assert result.status is Status.FAILED
    assert figures(parents(own)[0]) == {"fit/loss": 0.05, "fit/speed": 1.0}
    run_fits(storage, own, {"fit": FitConfig()}, stage, fail=True)
    (parent,) = parents(own)
    assert len(client(own).get_metric_history(parent.info.run_id, "fit/speed")) == 1
    shutil.rmtree(storage.path("artifacts"))
    stage.speed = 0.5
    run_fits(storage, own, {"fit": FitConfig()}, stage)
    (parent,) = parents(own)
    assert figures(parent) == {"fit/loss": 0.05, "fit/speed": 0.5}
    assert len(client(own).get_metric_history(parent.info.run_id, "fit/loss")) == 1


@pytest.mark.ci
def test_a_server_that_is_away_is_told_all_of_it_later_and_the_console_says_how(
    tmp_path: Path, own: MlflowTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    away = MlflowTarget("http://127.0.0.1:9", "away")
    storage = open_storage(tmp_path / "with blank")
    result = run_fits(storage, away, {"fit": FitConfig()}, overrides=(), drain_s=30)
    assert result.status is Status.SUCCEEDED
    assert [backlog.events for backlog in result.undelivered] == [18]
    said = capsys.readouterr().out
    assert "SUCCEEDED" in said
    assert f"18 points are not in MLflow yet: MLflow at {away.uri} cannot be reached" in said
    assert f"Deliver them: bmojo sync {result.run.run_id} --storage '{storage.url}'" in said
    assert sync(storage, result.run.relpath, result.run.run_id, own).remaining == 0
    (parent,) = parents(own)
    assert figures(parent) == {"fit/loss": 0.05, "fit/speed": 1.0}
    assert parent.data.params == {"fit.lr": "0.1", "fit.shape.width": "8", "show.words": "all"}
    assert parent.data.tags["mlflow.user"] == user_name()


def test_figures_are_journalled_even_if_the_driver_died_before_it_told_them(tmp_path: Path) -> None:
    """The stage's record is the truth; the next drive tells what the journal lacks, and only that."""
    storage, nowhere = open_storage(tmp_path), MlflowTarget("http://127.0.0.1:9", "nowhere")
    result = run_fits(storage, nowhere, {"fit": FitConfig()}, fail=True, drain_s=0)
    run_dir = storage.path(result.run.relpath)
    for journal in (run_dir / "journal").glob(f"{RUN_JOURNAL}.*"):
        journal.unlink()
    run_fits(storage, nowhere, {"fit": FitConfig()}, drain_s=0)
    tracking = RunTracking(storage, result.run.relpath, result.run.run_id, TrackingOptions((nowhere,)), [].append)
    told = [event["values"] for event in tracking._events(RUN_JOURNAL) if event["event"] == "metrics"]
    assert [without_costs(values) for values in told] == [{"fit/loss": 0.05, "fit/speed": 1.0}, {}]
    assert Replay(run_dir / "journal", nowhere, result.run.run_id).pending() > 0


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100'; echo 'NVIDIA T4'; echo 'NVIDIA H100'", "2 x NVIDIA H100, 1 x NVIDIA T4"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "none"),
        ("", "none"),
    ],
)
def test_gpus_are_what_the_drivers_tool_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine.cache_clear()
    assert machine()["gpus"] == expected
    machine.cache_clear()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_name_is_told_by_number() -> None:
    code = "import os; from pipelines.engine.provenance import user_name; os.setuid(54321); print(user_name())"
    nameless = {
        name: value for name, value in os.environ.items() if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")
    }
    assert subprocess.check_output([sys.executable, "-c", code], env=nameless, text=True) == "uid 54321\n"
