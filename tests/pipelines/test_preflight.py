"""`plan` and `run` refuse what the machine cannot give."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline
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


@pytest.mark.parametrize("name", ["the", "EOD", "###", "a"])
def test_an_end_of_document_token_that_text_can_spell_is_refused_before_anything_runs(
    pipeline_file: Path, name: str
) -> None:
    pipeline = open_pipeline(load_pipeline(pipeline_file, [f"tokenizer.end_of_document={name!r}"]))
    with pytest.raises(UserError, match=f"end_of_document={name!r}: ordinary text can be merged into a token"):
        pipeline.plan()
