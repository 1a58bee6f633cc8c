"""`plan` and `run` refuse what the machine cannot give."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline
from pipelines.neuron import runtime
from pipelines.session import open_pipeline
from tests.pipelines.test_loading import PIPELINE


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(PIPELINE + f"storage: {tmp_path}/runs\n")
    return file


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokens.resources.num_workers=100000"], "stages.tokens.resources: 100000 workers of 1 CPUs are far more"),
        (["train.resources.cpus_per_worker=100000"], "stages.train.resources: 2 workers of 100000 CPUs are far more"),
        (["cluster.num_cpus=1"], "stages.train.resources: 2 workers of 1 CPUs do not fit into cluster.num_cpus=1"),
        (["train.resources.gpus_per_worker=800"], "found 800 for each of 2 workers, but this machine has"),
        (["train.model.vocab_size=511"], "stages.train.model.vocab_size: found 511, which is less than the 512 ids"),
        (["train.max_steps=1000000000000"], "stages.train.max_steps: found 1000000000000, expected at most 1000000000"),
        (["train.model.d_model=10000000"], "stages.train.model.d_model: found 10000000, expected at most"),
    ],
)
def test_what_cannot_be_had_is_refused(pipeline_file: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_pipeline(load_pipeline(pipeline_file, overrides))
    assert expected in str(refused.value)
    assert not (pipeline_file.parent / "runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.model.vocab_size=512"], ["cluster.num_cpus=2"],
     ["tokens.resources.num_workers=3", "cluster.num_cpus=2"],
     ["train.resources.gpus_per_worker=800", "cluster.address=head:6379"]],
)  # fmt: skip
def test_what_can_be_had_is_accepted(pipeline_file: Path, overrides: list[str]) -> None:
    open_pipeline(load_pipeline(pipeline_file, overrides))


def test_unknown_kernels_are_refused(pipeline_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMOJO_KERNELS", "garbage")
    with pytest.raises(ConfigError, match="'garbage': there are no such kernels"):
        open_pipeline(load_pipeline(pipeline_file))


ON_CORES = ["tokens.seq_len=128", "train.backend={kind: neuron}", "train.resources.neuron_cores_per_worker=1"]


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        open_pipeline(load_pipeline(file, [*ON_CORES, *overrides]))
    assert not (file.parent / "runs").exists()
    return str(error.value)


def test_neuron_cores_need_the_package_of_aws(pipeline_file: Path) -> None:
    message = refused(pipeline_file)
    assert message.startswith("stages.train.resources.neuron_cores_per_worker: backend.kind=neuron needs torch-neuronx")
    assert "pip install -r requirements/neuron.txt" in message
    assert "backend.device: cpu" in message


@pytest.fixture
def with_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "require", lambda: None)


@pytest.mark.parametrize("num_cores", [0, 1])
def test_more_neuron_cores_than_neuron_ls_lists_are_refused(
    pipeline_file: Path, with_package: None, monkeypatch: pytest.MonkeyPatch, num_cores: int
) -> None:
    monkeypatch.setattr(runtime, "num_cores", lambda: num_cores)
    message = refused(pipeline_file)
    assert f"found 1 for each of 2 workers, but neuron-ls counts {num_cores} logical NeuronCores" in message
    assert "Lower num_workers, look at neuron-ls, or set cluster.address" in message


def test_as_many_as_it_lists_are_accepted_and_a_cluster_elsewhere_is_not_asked(
    pipeline_file: Path, with_package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "num_cores", lambda: 2)
    open_pipeline(load_pipeline(pipeline_file, ON_CORES))
    monkeypatch.undo()
    open_pipeline(load_pipeline(pipeline_file, [*ON_CORES, "cluster.address=head:6379"]))


def test_a_rehearsal_asks_for_nothing(pipeline_file: Path) -> None:
    open_pipeline(load_pipeline(pipeline_file, ["tokens.seq_len=128", "train.backend={kind: neuron, device: cpu}"]))


@pytest.mark.parametrize("kernels", ["triton", "cpp"])
def test_kernels_of_other_devices_are_refused_on_neuron_cores(
    pipeline_file: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setenv("BMOJO_KERNELS", kernels)
    assert f"BMOJO_KERNELS={kernels}: these kernels do not run on NeuronCores. Unset it" in refused(pipeline_file)


def test_sequences_that_tiles_do_not_divide_are_refused(pipeline_file: Path) -> None:
    assert "tokens.seq_len: train: seq_len=96 is not a multiple of 128" in refused(pipeline_file, "tokens.seq_len=96")


@pytest.mark.parametrize("name", ["the", "EOD", "###", "a"])
def test_an_end_of_document_token_that_text_can_spell_is_refused_before_anything_runs(
    pipeline_file: Path, name: str
) -> None:
    pipeline = open_pipeline(load_pipeline(pipeline_file, [f"tokenizer.end_of_document={name!r}"]))
    with pytest.raises(UserError, match=f"end_of_document={name!r}: ordinary text can be merged into a token"):
        pipeline.plan()
