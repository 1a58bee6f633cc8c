"""A mistake in a pipeline file is one clear screen: file, line, field, what was found and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline, model_presets, pipeline_schema

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

PIPELINE = """\
name: tiny
stages:
  tokenizer:
    kind: tokenizer
    source: {kind: python_stdlib}
    vocab_size: 512
  tokens:
    kind: tokenize
    needs: [tokenizer]
    source: {kind: python_stdlib}
    seq_len: 64
  train:
    kind: train
    needs: [tokens]
    model: {pattern: bmojo*2, d_model: 32, num_heads: 2, ssm_head_dim: 16, window_size: 32, chunk_size: 16}
    global_batch_size: 8
    micro_batch_size: 2
    max_steps: 10
    warmup_steps: 2
    resources: {num_workers: 2}
  evaluate:
    kind: evaluate
    needs: [train, tokens]
  report:
    kind: report
    needs: [train, evaluate]
"""


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(PIPELINE)
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_pipeline(file, overrides)
    return str(refused.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_loads(file: Path) -> None:
    assert load_pipeline(file).stages


def test_an_override_reaches_its_field(pipeline_file: Path) -> None:
    config = load_pipeline(pipeline_file, ["train.lr=1e-4", "tracking.experiment=mine", "train.model.d_model=64"])
    assert config.stages["train"].lr == 1e-4
    assert config.stages["train"].model.d_model == 64
    assert config.tracking.experiment == "mine"


def test_an_unknown_key_names_file_line_field_and_the_likely_one(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("warmup_steps: 2", "warmup_step: 2"))
    message = refusal(pipeline_file)
    line = PIPELINE.splitlines().index("    warmup_steps: 2") + 1
    assert f"{pipeline_file}:{line}: stages.train.warmup_step: unknown key. Did you mean 'warmup_steps'?" in message


def test_an_unknown_key_inside_the_model_is_found_too(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "train.model.num_head=4")
    assert "stages.train.model.num_head: unknown key. Did you mean 'num_heads'?" in message


def test_a_wrong_type_shows_what_was_found(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "train.max_steps=many")
    assert "stages.train.max_steps: found 'many'" in message
    assert "integer" in message


def test_an_unknown_kind_lists_the_kinds(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "report.kind=raport")
    assert "stages.report" in message
    assert "'raport'" in message
    assert "'report'" in message


def test_a_stage_that_needs_an_unknown_stage_is_refused(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "train.needs=[tokns]")
    assert "stages.train.needs" in message
    assert "'tokns'" in message


def test_a_cycle_is_printed(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "tokenizer.needs=[report]")
    assert "tokenizer -> report" in message


def test_a_need_of_the_wrong_kind_is_refused(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "train.needs=[tokenizer]")
    assert "stages.train.needs: 'tokenizer' is a tokenizer stage; a train stage reads tokenize and train" in message


def test_a_sequence_that_is_not_whole_chunks_is_refused(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "tokens.seq_len=72")
    assert "seq_len=72" in message
    assert "chunk_size=16" in message


def test_a_worker_count_that_does_not_divide_the_batch_is_refused(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "train.resources.num_workers=3")
    assert "global_batch_size=8" in message
    assert "num_workers=3" in message


def test_a_missing_file_names_its_neighbours(tmp_path: Path, pipeline_file: Path) -> None:
    message = refusal(tmp_path / "tyni.yaml")
    assert "tyni.yaml: no such file" in message
    assert "tiny.yaml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", ":2: not valid YAML: key 'name' stands twice"),
        ("name: [a\n", "not valid YAML"),
        ("- a\n", "found list at the top"),
        ("name: a\nstages: {}\n", "stages: found {}"),
        ("name: A B\nstages: {}\n", "name: found 'A B'"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert expected in refusal(file)


@pytest.mark.parametrize("override", ["train.lr", "=1", "nowhere.lr=1", "train.lr.x=1", "train.lr=[1"])
def test_broken_overrides_are_explained(pipeline_file: Path, override: str) -> None:
    message = refusal(pipeline_file, override)
    assert repr(override) in message or "stages.train.lr: found {'x': 1}" in message


def test_a_preset_can_be_named_and_changed(pipeline_file: Path) -> None:
    name = model_presets()[0]
    raw = yaml.safe_load(PIPELINE)
    raw["stages"]["tokens"]["seq_len"] = 2048
    raw["stages"]["train"]["model"] = name
    pipeline_file.write_text(yaml.safe_dump(raw))
    whole = load_pipeline(pipeline_file).stages["train"].model
    changed = load_pipeline(pipeline_file, ["train.model.num_eidetic=7"]).stages["train"].model
    assert changed == whole.replace(num_eidetic=7)


def test_an_unknown_preset_suggests_one(pipeline_file: Path) -> None:
    assert "Did you mean" in refusal(pipeline_file, "train.model=bmojo-130")


def test_the_schema_describes_every_field() -> None:
    schema = pipeline_schema()
    undescribed = [
        f"{name}.{field}"
        for name, definition in schema["$defs"].items()
        for field, content in definition.get("properties", {}).items()
        if "description" not in content and field != "kind"
    ]
    assert not undescribed
