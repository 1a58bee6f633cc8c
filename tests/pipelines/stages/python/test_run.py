"""Python stages on Ray: in a task of their own, killed and resumed, run again when their source changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.engine.graph import stage_graph, with_results
from pipelines.engine.plan import plan
from pipelines.engine.stage import StageContext, StageNode, StageResult
from pipelines.stages import STAGES
from pipelines.stages.python.config import PythonStageConfig
from pipelines.storage import open_storage
from pipelines.tracking.journal import Journal, read_events
from tests.pipelines.end_to_end.tiny_pipeline import TinyPipeline, kill_tree, wait_until

COUNTING = """\
import os, time
from helper import square

def count(stage):
    resumed_after = len(list(stage.folder.iterdir()))
    stage.log_params({"steps wanted": stage.args["steps"]})
    for step in range(resumed_after, stage.args["steps"]):
        time.sleep(stage.args.get("step_s", 0))
        (stage.folder / f"{step:02}.txt").write_text(str(square(step)))
        stage.log_metrics(step, {"square": square(step)})
        stage.progress(step + 1, stage.args["steps"])
    return {"resumed_after": resumed_after, "pid": os.getpid()}

def add(stage):
    read = [stage.inputs["counted"], *stage.gathered.get("more", ())]
    files = [file for one in read for file in one.path.glob("*.txt")]
    assert all(one.output["pid"] > 0 and one.config.args["steps"] > 0 for one in read)
    return {"total": sum(int(file.read_text()) for file in files), "kinds": " ".join(one.kind for one in read)}

def fail(stage):
    raise KeyError(stage.inputs["counted"].name)
"""
HELPER = "def square(x):\n    return x * x\n"
PIPELINE = """\
name: tiny
storage: {folder}/runs
stages:
  count: {{kind: python, call: "counting:count", args: {{steps: 40, step_s: 0.1}}}}
  add: {{kind: python, call: "counting:add", needs: {{counted: count}}}}
"""


def write_sources(folder: Path) -> None:
    (folder / "counting.py").write_text(COUNTING)
    (folder / "helper.py").write_text(HELPER)


@pytest.mark.ci
def test_stages_run_in_ray_tasks_and_read_each_other(ray_cluster: None, tmp_path: Path) -> None:
    write_sources(tmp_path)
    configs = {
        name: PythonStageConfig(kind="python", folder=str(tmp_path), **fields)  # type: ignore[arg-type]
        for name, fields in {
            "a": {"call": "counting:count", "args": {"steps": 3}},
            "b": {"call": "counting:count", "args": {"steps": 4}},
            "add": {"call": "counting:add", "needs": {"counted": "a", "more": ["a2"]}},
            "a2": {"call": "counting:count", "args": {"steps": 2}},
            "fail": {"call": "counting:fail", "needs": {"counted": "b"}},
        }.items()
    }
    finished = {}
    for planned in plan(stage_graph(configs, STAGES), open_storage(tmp_path / "runs")):
        node = planned.node
        journal = Journal(tmp_path / "journal" / f"{node.name}.000001.jsonl")
        content = planned.fingerprint.parts.content
        context = StageContext(node.name, planned.fingerprint.digest, planned.artifact, journal, content)
        inputs = with_results(node, finished)
        if node.name == "fail":
            with pytest.raises(UserError, match=r"(?s)counting:fail raised KeyError: 'b'\n  .*counting.py:\d+ in fail"):
                node.stage.run(node.config, inputs, context)
            continue
        with journal:
            output = node.stage.run(node.config, inputs, context)
        result = StageResult(planned.fingerprint.digest, planned.artifact, output)
        finished[node.name] = StageNode(node.name, node.stage, node.config, inputs, result)
    assert finished["a"].output["pid"] != os.getpid()
    assert finished["add"].output["total"] == 0 + 1 + 4 + 0 + 1
    assert finished["add"].output["kinds"] == "python python"
    points = [event for event, _ in read_events(tmp_path / "journal" / "a.000001.workers.jsonl")]
    values = [(point["step"], point["values"]) for point in points if point["event"] == "metrics"]
    assert [(step, value["square"]) for step, value in values if "square" in value] == [(0, 0), (1, 1), (2, 4)]
    assert [point["params"] for point in points if point["event"] == "params"] == [{"steps wanted": 3}]
    (tmp_path / "helper.py").write_text(HELPER + "# changed\n")
    with pytest.raises(UserError, match="the files it reads have changed since the run was planned"):
        node.stage.run(node.config, inputs, context)


@pytest.mark.slow
def test_it_resumes_with_its_folder_is_reused_and_runs_again_when_its_source_changes(tmp_path: Path) -> None:
    pipeline = TinyPipeline(tmp_path)
    write_sources(tmp_path)
    pipeline.file.write_text(PIPELINE.format(folder=tmp_path))

    def files() -> list[Path]:
        return sorted(pipeline.storage.glob("artifacts/python/count-*/files/*.txt"))

    process = pipeline.start("run", str(pipeline.file))
    wait_until(lambda: len(files()) >= 5, process)
    kill_tree(process)
    before = {file: file.stat().st_mtime_ns for file in files()[:-1]}  # the last may be half written
    again = pipeline.run()
    assert again.code == 0, again.output
    assert "count: resuming" in again.output
    assert "total 20,540" in again.output
    (record,) = pipeline.storage.glob("artifacts/python/count-*/record.json")
    assert json.loads(record.read_text())["output"]["numbers"]["resumed_after"] >= 5
    assert {file: file.stat().st_mtime_ns for file in before} == before
    steps = [step for step, _ in pipeline.points("square", "count")]
    assert sorted(set(steps)) == list(range(40))
    assert len(steps) == len(set(steps))

    (tmp_path / "unused.py").touch()
    reused = pipeline.run()
    assert (reused.output.count("reused"), reused.code) == (2, 0)

    (tmp_path / "helper.py").write_text(HELPER.replace("x * x", "x * x + 1"))
    planned = pipeline.bmojo("plan", str(pipeline.file))
    assert "source of helper" in planned.output
    assert "source of counting" not in planned.output
    changed = pipeline.run("count.args.step_s=0", "count.args.steps=3")
    assert changed.code == 0, changed.output
    assert "total 8" in changed.output
