"""`bmojo run` from text to report and export by the Neuron backend: on a simulated device, and rehearsed on CPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bmojo.checkpoint_io import load_pretrained
from tests.pipelines.end_to_end.tiny_pipeline import TinyPipeline, kill_tree, wait_until, write_pipeline
from tests.pipelines.stages.train.neuron_workers import ROOT, SIMULATED

pytestmark = pytest.mark.slow

EXPORT = "  export: {kind: export, needs: [train]}\n"
# Only what a NeuronCore needs differs from the other pipelines here, and eps: AdamW divides by the size of a gradient,
# and where that is all rounding, its weight would move as far as others.
COMMON = ("tokens.seq_len=128", "train.precision=fp32", "train.eps=1e-3")
ON_CORES = ("train.backend={kind: neuron, parallel: zero1}", "train.resources.neuron_cores_per_worker=1")
REHEARSED = ("train.backend={kind: neuron, parallel: fsdp2, device: cpu}",)


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> TinyPipeline:
    """The same pipeline, whose training is DeepSpeed's on the CPU."""
    pipeline = with_export(tmp_path_factory.mktemp("deepspeed"))
    finished = pipeline.run(*COMMON)
    assert finished.code == 0, finished.output
    return pipeline


@pytest.fixture
def two_simulated_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with AWS's tools and package, as far as commands that are started in it can tell."""
    program = tmp_path / "bin" / "neuron-ls"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '[{\"nc_count\": 2}]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(SIMULATED)]))


def with_export(folder: Path) -> TinyPipeline:
    pipeline = write_pipeline(folder)
    pipeline.file.write_text(pipeline.file.read_text() + EXPORT)
    return pipeline


def require_the_same(pipeline: TinyPipeline, expected: TinyPipeline) -> None:
    """Losses of every step, validation and evaluation, and weights, as far as rounding goes."""
    losses = dict(pipeline.points("train/loss", "train"))
    assert sorted(losses) == list(range(1, 17))
    assert losses == pytest.approx(dict(expected.points("train/loss", "train")), abs=1e-5)
    found, wanted = (each.record("train")["output"] for each in (pipeline, expected))
    for name in ("final_train_loss", "initial_valid_loss", "final_valid_loss"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5)
    found, wanted = (each.record("evaluate")["output"]["results"][0]["figures"] for each in (pipeline, expected))
    assert [figure["name"] for figure in found] == [figure["name"] for figure in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-4), one["name"]
    assert (pipeline.artifact("report") / "report.html").stat().st_size > 0
    assert list(pipeline.artifact("export").rglob("model.safetensors"))
    weights, others = (load_pretrained(each.artifact("train") / "model").state_dict() for each in (pipeline, expected))
    for name, value in weights.items():
        assert float((value - others[name]).abs().max()) < 1e-4, name


def test_killed_on_simulated_cores_and_resumed_it_is_deepspeeds_run(
    tmp_path: Path, by_deepspeed: TinyPipeline, two_simulated_cores: None
) -> None:
    pipeline = with_export(tmp_path / "pipeline")
    process = pipeline.start("run", str(pipeline.file), *COMMON, *ON_CORES)
    wait_until(lambda: len(pipeline.checkpoints()) >= 2, process)
    kill_tree(process)
    assert not list(pipeline.storage.glob("artifacts/train/*/record.json")), "it was killed too late"
    newest = max(int(file.parent.name.removeprefix("step-")) for file in pipeline.checkpoints())
    again = pipeline.run(*COMMON, *ON_CORES)
    assert again.code == 0, again.output
    assert pipeline.points("train/resumed_from_step", "train") == [(newest, newest)]
    assert pipeline.record("train")["output"]["devices"] == "2 x logical NeuronCore (torch-neuronx 2.14.3.0)"
    require_the_same(pipeline, by_deepspeed)


def test_rehearsed_on_cpus_it_is_deepspeeds_run(
    tmp_path: Path, by_deepspeed: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMOJO_KERNELS", "static")
    pipeline = with_export(tmp_path)
    finished = pipeline.run(*COMMON, *REHEARSED)
    assert finished.code == 0, finished.output
    require_the_same(pipeline, by_deepspeed)


def test_more_workers_than_cores_are_refused_before_anything_starts(tmp_path: Path, two_simulated_cores: None) -> None:
    pipeline = with_export(tmp_path / "pipeline")
    refused = pipeline.run(*COMMON, *ON_CORES, "train.resources.num_workers=4")
    assert refused.code == 1
    assert "neuron-ls counts 2 logical NeuronCores" in " ".join(refused.output.split())
    assert not pipeline.storage.exists()
