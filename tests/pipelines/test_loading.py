"""A mistake in a pipeline file is one clear screen: file, line, field, what was found and what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.loading import load_pipeline, model_presets, pipeline_schema, validate_pipeline
from pipelines.redact import redact
from pipelines.session import open_pipeline
from pipelines.tracking.config import trackers_of
from tests.pipelines.refusals import refusal

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


@pytest.mark.parametrize(
    "file", sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("reproduce/*.yaml")]), ids=lambda file: file.name
)
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
        ("- a\n", "found a list, expected a mapping with `name` and `stages`"),
        ("", "found an empty file, expected a mapping"),
        ("# nothing\n", "found an empty file, expected a mapping"),
        ("name: a\nstages: {}\n", ":2: stages: found {}, expected at least 1 entries"),
        ("name: A B\nstages: {}\n", ":1: name: found 'A B', which has another form. Name of the pipeline: lower-case"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", ":1: not valid YAML: a key must be a name, found ['a', 'b']"),
        ("name: a\n1: b\n", ":2: not valid YAML: a key must be a name, found 1"),
        ("a: " + "[" * 3000, ":1: not valid YAML: more than 40 levels deep"),
        ("\n".join(" " * depth + "a:" for depth in range(3000)), ":41: not valid YAML: more than 40 levels deep"),
        ("name: 2024-13-45\n", ":1: not valid YAML: '2024-13-45' cannot be read as timestamp"),
        ("\nname: !!int x\n", ":2: not valid YAML: 'x' cannot be read as int"),
        ("name: " + "9" * 5000, "cannot be read as int"),
        ("name: a\nb: a\0b\n", ":2: not valid YAML: character '\\x00' is not allowed"),
        ('name: a\nstages: {x: {kind: "\\ud83d"}}\n', r":2: stages.x.kind: holds half of a character (\ud83d"),
        ('name: a\nstorage: "a\\0b"\n', ":2: storage: holds a NUL character"),
        ('name: "\\ud83d\\ude00"\nstages: {}\n', "name: found '😀'"),
        ("a: &a [*a]\n", ":1: a: unknown key"),
        ("a: &a {<<: *a}\n", ":1: a: unknown key"),
        (
            "name: a\nstages: {x: {load: y}}\n",
            ":2: stages.x: `kind` is missing. It is one of tokenizer, tokenize, train",
        ),
        ("name: a\nstages: {x: 3}\n", ":2: stages.x: found 3, expected a mapping of fields"),
        ("name: a\nstages: {a/b: {kind: tokenizer, load: y}}\n", ":2: stages.a/b: The name of a stage"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert expected in refusal(file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr", "expected field.path=value"),
        ("=1", "expected field.path=value"),
        ("nowhere.lr=1", "'nowhere' is neither a stage nor a field"),
        ("--train.lr=1", "Overrides are written without dashes."),
        ("train.lr.x=1", "stages.train.lr: found {'x': 1}, expected a number."),
        ("train.lr=[1", "the value is not valid YAML"),
        ("train.lr=abc", "stages.train.lr: found 'abc', expected a number."),
        ("train.lr=.inf", "stages.train.lr: found inf, expected a finite number."),
        ("train.eps=nan", "stages.train.eps: found 'nan', expected a finite number."),
        ("train.model.norm_eps=.inf", "stages.train.model.norm_eps: found inf, expected a finite number."),
        ("tokens.validation_fraction=.nan", "stages.tokens.validation_fraction: found nan, expected a finite number."),
        ("train.max_steps=1.5", "stages.train.max_steps: found 1.5, expected an integer."),
        ("train.global_batch_size=-8", "stages.train.global_batch_size: found -8, expected a number above 0."),
        (
            "train.backend={kind: deepspeed, zero_stage: 7}",
            "train.backend.zero_stage: found 7, expected 0, 1, 2 or 3.",
        ),
        ("train.backend={zero_stage: 2}", "stages.train.backend: `kind` is missing. It is one of deepspeed, neuron."),
        ("train.backend={kind: fsdp}", "stages.train.backend: found kind 'fsdp', expected one of deepspeed, neuron."),
        ("train.zero_stage=2", "stages.train.zero_stage: unknown key. Did you mean 'backend.zero_stage'?"),
        ("train.offload={}", "stages.train.offload: unknown key. Did you mean 'backend.offload'?"),
        ("train.deterministic=maybe", "stages.train.deterministic: found 'maybe', expected true or false."),
        ("train.needs=tokens", "stages.train.needs: found 'tokens', expected a list, such as [a, b]."),
        ("train.betas=[1.5,0.9]", "stages.train: betas=[1.5, 0.9]: each must be"),
        ("train.warmup_steps=50", "stages.train: warmup_steps=50 leaves no step of max_steps=10"),
        ("train.model.window_size=8", "stages.train.model: chunk_size=16 exceeds window_size=8"),
        ("tokenizer.source=null", "stages.tokenizer: found neither of source and load"),
        ("tokenizer.source={kind: files, paths: []}", "stages.tokenizer.source.paths: found [], expected at least 1"),
        (
            "tokenizer.source={kind: bytes, paths: [x]}",
            "stages.tokenizer.source: found kind 'bytes', expected one of files, huggingface, python_stdlib.",
        ),
        (
            "tokens.needs=[]",
            "stages.tokens.needs: names no stage of kind tokenizer, which a source of text (kind 'python_stdlib')",
        ),
        (
            "tokens.source={kind: bytes, paths: [x]}",
            "stages.tokens.source: kind 'bytes' has token ids already, but `needs` names the tokenizer 'tokenizer'.",
        ),
        (
            "tokens.source={kind: synthetic, num_documents: 3, task: {kind: mqr}}",
            "stages.tokens.source.task: found kind 'mqr', expected one of mqar, in_context_recall, noisy_recall, ",
        ),
        (
            "tokens.source={kind: synthetic, num_documents: 3, task: {kind: mqar, num_pair: 3}}",
            "stages.tokens.source.task.num_pair: unknown key. Did you mean 'num_pairs'?",
        ),
        ("train.schedule={kind: x}", "stages.train.schedule: found kind 'x', expected one of cosine, linear, wsd, "),
        ("report.kind=null", "stages.report: `kind` is missing. It is one of tokenizer, "),
        (
            "report.kind=raport",
            "found kind 'raport', expected one of tokenizer, tokenize, train, evaluate, ladder, report, ",
        ),
        (
            "train.needs=null",
            "stages.train.needs: found nothing (null), expected a list, such as [a, b]. A mapping of roles will "
            "do, too: {role: a}.",
        ),
        ("train.needs=[1]", "stages.train.needs: found 1, expected the name of a stage."),
        ("train.needs={tokens: 1}", "stages.train.needs: tokens: found 1, expected the name of a stage."),
        (
            "train.needs={token: tokens}",
            "stages.train.needs.token: a train stage has no role 'token'. Its roles: tokens (at least 1 of kind "
            "tokenize), initial (at most 1 of kind train).",
        ),
        ("tokenizer.needs={text: tokens}", "stages.tokenizer.needs: the stages wait for one another in a circle"),
        (
            "train.needs={tokens: tokenizer}",
            "stages.train.needs.tokens: 'tokenizer' is a tokenizer stage, expected at least 1 of kind tokenize. This "
            "pipeline's tokenize stages: tokens.",
        ),
        (
            "train.needs={tokens: []}",
            "stages.train.needs.tokens: found 0 stages of kind tokenize, expected at least 1. This pipeline's tokenize "
            "stages: tokens.",
        ),
        ("evaluate.needs={trained: train}", "stages.evaluate.needs: role tokens: found 0 stages of kind tokenize, exp"),
        ("evaluate.needs=[train]", "stages.evaluate.needs: found 0 stages of kind tokenize, expected at least 1."),
        ("evaluate.needs={trained: train, tokens: x}", "stages.evaluate.needs: there is no stage 'x'"),
        (
            "report.needs={evaluated: evaluate}",
            "stages.report.needs: has 'evaluate' but not 'train', the train stage it",
        ),
        (
            "report.needs={trained: train}",
            "stages.report.needs: role evaluated: found 0 stages of kind evaluate, expected",
        ),
        (
            "report.needs={evaluated: [evaluate, evaluate]}",
            "stages.report.needs: evaluate, evaluate names a stage twice",
        ),
        ("train.needs=[report]", "stages.train.needs: the stages wait for one another in a circle"),
        ("tokens.needs.0=x", "stages.tokens.needs: there is no stage 'x'"),
        ("tokens.needs.5=x", "stages.tokens.needs is a list of 1; expected the number of an entry"),
        ("name.lr=1", "name is not a mapping; give it a whole value instead. The stage of that name is stages.name."),
        ("train.learning_rate=1", "stages.train.learning_rate: unknown key. Did you mean 'lr' or"),
        (
            "train.batch_size=3",
            "unknown key. Did you mean 'micro_batch_size' or 'global_batch_size' or 'batch_size_warmup'?",
        ),
        (
            'evaluate.measures=[{kind: samples, prompts: ["\\ud83d"]}]',
            "stages.evaluate.measures.0.prompts.0: holds half of a character",
        ),
        ("name=\udcff", "the value is not valid YAML: character '\\udcff' is not allowed"),
    ],
)
def test_a_wrong_override_is_named(pipeline_file: Path, override: str, expected: str) -> None:
    message = refusal(pipeline_file, override)
    assert message.startswith(f"override {override!r}: ")
    assert expected in message
    assert len(message.splitlines()) == 1


def test_a_mistake_of_the_file_has_its_line_beside_overrides(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("max_steps: 10", "max_steps: ten"))
    line = PIPELINE.splitlines().index("    max_steps: 10") + 1
    assert refusal(pipeline_file, "train.lr=1e-3").startswith(f"{pipeline_file}:{line}: stages.train.max_steps: ")


def test_only_training_has_a_fewest_number_of_workers(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, "tokens.resources.min_workers=1")
    assert "stages.tokens.resources.min_workers: found 1, but only training workers work together" in message


def test_known_keys_are_listed_once(pipeline_file: Path) -> None:
    message = refusal(pipeline_file, *(f"train.{key}=1" for key in ("q1", "zz", "foo", "xyz", "abc", "uuu", "vvv")))
    assert message.count("micro_batch_size") == 1
    assert "Known keys of stages.train: activation_checkpointing, backend, backoff_s, batch_size_warmup, " in message
    assert message.count("unknown key.") == 6
    assert "... and 1 more." in message


def test_roles_and_the_list_give_the_same_stages(pipeline_file: Path) -> None:
    overrides = [
        "tokens.needs={tokenizer: tokenizer}",
        "train.needs={tokens: tokens}",
        "evaluate.needs={tokens: tokens, trained: [train]}",
        "report.needs={evaluated: evaluate, trained: [train]}",
    ]

    def fingerprints(*overrides: str) -> dict[str, str]:
        pipeline = open_pipeline(load_pipeline(pipeline_file, overrides))
        return {stage.name: stage.fingerprint.digest for stage in pipeline.plan()}

    assert fingerprints(*overrides) == fingerprints()
    config = load_pipeline(pipeline_file, overrides)
    assert validate_pipeline(redact(config.model_dump(mode="json")), "run.json") == config, "as `bmojo resume` reads it"


def test_a_role_can_be_overridden(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("needs: [train, tokens]", "needs: {trained: train, tokens: other}"))
    config = load_pipeline(pipeline_file, ["evaluate.needs.tokens=tokens"])
    assert config.stages["evaluate"].needed == ("train", "tokens")
    line = PIPELINE.splitlines().index("    needs: [train, tokens]") + 1
    assert refusal(pipeline_file).startswith(
        f"{pipeline_file}:{line}: stages.evaluate.needs: there is no stage 'other'"
    )


def test_an_entry_of_a_list_can_be_overridden(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("warmup_steps: 2", "warmup_steps: 2\n    betas: [0.9, 0.95]"))
    assert load_pipeline(pipeline_file, ["train.betas.1=0.99"]).stages["train"].betas == (0.9, 0.99)


def test_a_field_at_the_top_comes_before_a_stage_of_its_name(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("  evaluate:", "  name:").replace("[train, evaluate]", "[train, name]"))
    config = load_pipeline(pipeline_file, ["name=other", "stages.name.batch_size=3"])
    assert config.name == "other"
    assert config.stages["name"].batch_size == 3


def test_an_escaped_pair_of_surrogates_is_one_character(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE + '    title: "\\ud83d\\ude00"\n', encoding="utf-8")
    assert load_pipeline(pipeline_file).stages["report"].title == "😀"


def test_overrides_before_the_file_are_noticed(pipeline_file: Path) -> None:
    assert "overrides come after the file" in refusal(Path("train.lr=1"), str(pipeline_file))


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


def test_the_schema_and_the_help_come_without_torch(tmp_path: Path) -> None:
    script = "import sys; from pipelines.cli.app import app; app(sys.argv[1:], standalone_mode=False); "
    script += "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    for arguments in (["schema", "--output", str(tmp_path / "schema.json")], ["--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_schema_describes_every_field() -> None:
    schema = pipeline_schema()
    undescribed = [
        f"{name}.{field}"
        for name, definition in schema["$defs"].items()
        for field, content in definition.get("properties", {}).items()
        if "description" not in content and field != "kind"
    ]
    assert not undescribed


def test_one_tracker_or_a_list_of_them(pipeline_file: Path) -> None:
    alone = load_pipeline(pipeline_file, ["tracking={experiment: mine}"]).tracking
    assert trackers_of(alone) == (alone,)
    listed = load_pipeline(pipeline_file, ["tracking=[{kind: mlflow, experiment: mine}]", "tracking.0.uri=http://h"])
    assert trackers_of(listed.tracking) == (alone.model_copy(update={"uri": "http://h"}),)
    again = validate_pipeline(listed.model_dump(mode="json"), "a stored run")
    assert again.tracking == listed.tracking


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        ("{experimnt: a}", "tracking.experimnt: unknown key. Did you mean 'experiment'?"),
        ("5", "tracking: found 5, expected a mapping of fields."),
        ("{kind: mlfow}", "tracking: found kind 'mlfow', expected one of mlflow"),
        ("[]", "tracking: found an empty list, expected at least one tracker."),
        ("[{kind: mlflow, experimnt: a}]", "tracking.0.experimnt: unknown key. Did you mean 'experiment'?"),
        ("[{kind: mlflow, experiment: ''}]", "tracking.0.experiment: found '', expected at least 1 characters."),
        ("[5]", "tracking.0: found 5, expected a mapping"),
    ],
)
def test_an_error_in_a_tracker_names_it_as_it_is_written(pipeline_file: Path, tracking: str, expected: str) -> None:
    message = refusal(pipeline_file, f"tracking={tracking}")
    assert expected in message
    assert len(message.splitlines()) == 1
