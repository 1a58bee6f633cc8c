"""`foreach` in a pipeline file: the same stages as written out, errors in the file's words, overrides, the schema."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import PipelineConfig
from pipelines.errors import ConfigError
from pipelines.foreach.values import VARIANT
from pipelines.loading import load_pipeline, pipeline_schema, validate_pipeline
from pipelines.redact import redact
from pipelines.session import open_pipeline
from pipelines.stages import STAGES
from tests.pipelines.refusals import refusal

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

PIPELINE = """\
name: tiny
stages:
  tokenizer: {kind: tokenizer, source: {kind: python_stdlib}, vocab_size: 512}
  tokens: {kind: tokenize, needs: [tokenizer], source: {kind: python_stdlib}, seq_len: 64}
  train:
    kind: train
    needs: [tokens]
    foreach:
      model:
        bmojo: {pattern: bmojo*2}
        swa: {pattern: swa*2, d_ff: 128}
      seed: [0, 1]
    model: {d_model: 32, num_heads: 2, ssm_head_dim: 16, window_size: 32, chunk_size: 16}
    global_batch_size: 8
    micro_batch_size: 2
    max_steps: 10
    warmup_steps: 2
  evaluate:
    kind: evaluate
    needs: [train, tokens]
  report:
    kind: report
    needs:
      trained: train[*]
      evaluated: evaluate[*]
"""
TRAINED = ["train-bmojo-0", "train-bmojo-1", "train-swa-0", "train-swa-1"]


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(PIPELINE)
    return file


def line_of(text: str) -> int:
    (line,) = (number for number, line in enumerate(PIPELINE.splitlines(), 1) if text in line)
    return line


def fingerprints(config: PipelineConfig) -> dict[str, str]:
    return {stage.name: stage.fingerprint.digest for stage in open_pipeline(config).plan()}


def written_out(raw: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A file whose one stage with `foreach` varies its model only, with every stage written out, by other names."""
    raw = copy.deepcopy(raw)
    stages = raw["stages"]
    train, evaluate = stages.pop("train"), stages.pop("evaluate")
    models = train.pop("foreach")["model"]
    for name, model in models.items():
        stages[name] = train | {"model": train["model"] | model}
        stages[f"evaluate_{name}"] = evaluate | {"needs": [name, "tokens"]}
    stages["report"]["needs"] = [*models, *(f"evaluate_{name}" for name in models)]
    assert tuple(models) == names
    return raw


def test_copies_have_the_fingerprints_of_stages_that_are_written_out(pipeline_file: Path) -> None:
    raw = yaml.safe_load(PIPELINE) | {"storage": str(pipeline_file.parent)}
    del raw["stages"]["train"]["foreach"]["seed"]
    pipeline_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    names = ("bmojo", "swa")
    explicit = fingerprints(validate_pipeline(written_out(raw, names), "explicit"))
    copies = fingerprints(load_pipeline(pipeline_file))
    for name in names:
        assert copies.pop(f"train-{name}") == explicit.pop(name)
        assert copies.pop(f"evaluate-{name}") == explicit.pop(f"evaluate_{name}")
    assert copies == explicit
    assert set(copies) == {"tokenizer", "tokens", "report"}


def test_a_further_value_changes_no_other_fingerprint(pipeline_file: Path) -> None:
    before = fingerprints(load_pipeline(pipeline_file))
    after = fingerprints(
        load_pipeline(pipeline_file, ["train.foreach.seed=[2,0,1]", "train.foreach.model.m={pattern: mamba2*2}"])
    )
    report = before.pop("report")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2 * (3 * 3 - 2 * 2) + 1
    assert after["report"] != report, "it reads more"
    assert len(set(after.values())) == len(after)


def test_a_run_stores_what_it_resumes_from(pipeline_file: Path) -> None:
    config = load_pipeline(pipeline_file)
    assert list(config.stages)[2:] == [*TRAINED, *(name.replace("train", "evaluate") for name in TRAINED), "report"]
    assert config.stages["evaluate-swa-1"].needed == ("train-swa-1", "tokens")
    assert config.stages["report"].needs["trained"] == tuple(TRAINED)
    assert validate_pipeline(redact(config.model_dump(mode="json")), "run.json") == config


@pytest.mark.ci
def test_plan_shows_the_copies(pipeline_file: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "plan", str(pipeline_file), f"storage={pipeline_file.parent}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line.split()[:3] for line in done.stdout.splitlines()]
    assert [[name, "train", "run"] for name in TRAINED] == [row for row in shown if row[1:] == ["train", "run"]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lrr=1", "stages.train.lrr: unknown key. Did you mean 'lr'?"),
        ("train.forech={seed: [0]}", "stages.train.forech: unknown key. Did you mean 'foreach'?"),
        ("train.lr=x", "stages.train.lr: found 'x', expected a number."),
        ("train.foreach=null", "stages.train.foreach: found nothing (null), expected a mapping of fields to their"),
        ("train.foreach={}", "stages.train.foreach: found {}, expected a mapping of fields to their values"),
        ("train.foreach.seed=3", "stages.train.foreach.seed: found 3, expected a list of values, or a mapping of"),
        ("train.foreach.seed=[]", "stages.train.foreach.seed: found [], expected at least one value."),
        ("train.foreach.model={}", "stages.train.foreach.model: found {}, expected at least one value."),
        ("train.foreach.seed=[0, 1, 0]", "stages.train.foreach.seed.2: 0 and 0 are both called '0'. Give each value"),
        ("train.foreach.lr=[1, 1.0]", "stages.train.foreach.lr.1: 1 and 1.0 are both called '1'."),
        ("train.foreach.seed=[0, x]", "stages.train.foreach.seed.1: found 'x', expected an integer."),
        ("train.foreach.seed={one: x}", "stages.train.foreach.seed.one: found 'x', expected an integer."),
        ("train.foreach.sed=[0, 1]", "stages.train.foreach.sed: unknown key. Did you mean 'seed'?"),
        ("train.foreach.zero_stage=[0, 1]", "foreach.zero_stage: unknown key. Did you mean 'backend.zero_stage'?"),
        ("train.foreach.modl.d_ff=[8, 16]", "stages.train.foreach.modl.d_ff: unknown key. Did you mean 'model'?"),
        ("train.foreach.lr.max=[8]", "stages.train.foreach.lr.max: found {'max': 8}, expected a number."),
        (
            "train.foreach.max_steps.x=[8, 16]",
            "stages.train.foreach.max_steps.x.0: max_steps is 10, which has no field",
        ),
        ("train.foreach.a..b=[1]", "expected field.path=value"),
        (
            "train.foreach={a..b: [1]}",
            "stages.train.foreach.a..b: found 'a..b', expected a field of the stage, such as",
        ),
        ("train.foreach.kind=[train]", "stages.train.foreach.kind: 'kind' is the same in all copies of a stage."),
        ("train.foreach.needs=[[tokens]]", "stages.train.foreach.needs: 'needs' is the same in all copies of a stage."),
        ("train.foreach.foreach=[1]", "stages.train.foreach.foreach: 'foreach' is the same in all copies"),
        ("train.foreach.model.swa.d_fff=1", "stages.train.foreach.model.swa.d_fff: unknown key. Did you mean 'd_ff'?"),
        ("train.foreach.model=[no-such-1]", "stages.train.foreach.model.0: no model preset 'no-such-1'."),
        ("train.foreach.model={a: {preset: x}}", "stages.train.foreach.model.a.preset: no model preset 'x'."),
        (
            "train.foreach.model=[{pattern: swa}]",
            "{'pattern': 'swa'} cannot be part of a stage's name. Name the values",
        ),
        (
            "train.foreach.model.pattern=[swa, mamba2*2]",
            "stages.train.foreach.model.pattern: found ['swa', 'mamba2*2']",
        ),
        ("train.foreach.precision=[bf16, a b]", "precision.1: 'a b' cannot be part of a stage's name. Name the values"),
        ("train.foreach.seed={a b: 0}", "stages.train.foreach.seed.a b: 'a b' cannot be part of a stage's name."),
        ("train.foreach.warmup_steps=[2, 12]", "stages.train: warmup_steps=12 leaves no step of max_steps=10 at full"),
        ("tokens.foreach.seq_len=[64, 72]", "stages.tokens.foreach.seq_len.1: seq_len=72 is not a multiple of"),
        (f"train.foreach.seed={{{'a' * 30}: 0}}", f"a copy would have the name 'train-bmojo-{'a' * 30}'"),
        (f"train.foreach.seed={list(range(501))}", "(2 of model x 501 of seed) make 1002 copies of 'train', expected"),
        ("report.needs=[tokens[*]]", 'In a list or mapping with brackets, it needs quotes: "tokens[*]".'),
        ("report.needs={trained: train[seed=0]}", 'it needs quotes: "train[seed=0]".'),
        (
            "report.needs=['tokens[*]']",
            "stages.report.needs: 'tokens[*]': 'tokens' has no copies, since neither it nor",
        ),
        ("report.needs=['nothing[*]']", "stages.report.needs: there is no stage 'nothing' in this pipeline."),
        ("report.needs=['train[']", "stages.report.needs: found 'train['. Expected STAGE for the copy that fits,"),
        ("report.needs=['train[seed]']", "stages.report.needs: found 'train[seed]'. Expected STAGE for the copy"),
        ("report.needs=['train[seed=0,seed=1]']", "stages.report.needs: found 'train[seed=0,seed=1]'. Expected"),
        ("report.needs.trained='train[lr=1]'", "stages.report.needs.trained: 'train[lr=1]': 'lr' is no field of its"),
        ("report.needs.trained='train[seed=0,train.seed=1]'", "'train[seed=0,train.seed=1]' names a field twice."),
        (
            "report.needs=[train, 'evaluate[seed=0]']",
            "'evaluate[seed=0]' has no copy with the values of 'report-bmojo-1'",
        ),
        ("report.needs.trained='train[seed=7]'", "'train[seed=7]': no value '7' of seed. Known: 0, 1."),
        ("report.needs.trained=train-swa-0", "'train-swa-0' is a copy of 'train'. Write train[model=swa, seed=0], or"),
        ("report.needs=['train[*]', 'train[seed=0]', 'evaluate[*]']", "names a stage twice"),
        ("train.needs=[tokens, 'train[*]']", "stages.train.needs: 'train' needs itself."),
        ("train.needs=[tokens, 'evaluate[*]']", "the stages wait for one another in a circle: train -> evaluate -> tr"),
        ("train.seed=3", "stages.train.seed: no effect: every copy of 'train' has a value of `foreach` here. Set tr"),
        ("train.model.pattern=swa*2", "stages.train.model.pattern: no effect: every copy of 'train' has a value of"),
        ("train-swa-0.lr=1", "'train-swa-0' is a copy of stage 'train'. Override the stage, and with it all of its"),
        ("stages.train-swa-0.lr=1", "its copies: train.lr=...; or the values: train.foreach."),
        ("evaluate-swa-0.batch_size=1", "'evaluate-swa-0' is a copy of stage 'evaluate'."),
    ],
)
def test_a_wrong_override_is_named(pipeline_file: Path, override: str, expected: str) -> None:
    message = refusal(pipeline_file, override)
    assert message.startswith(f"override {override!r}: ")
    assert expected in message
    assert len(message.splitlines()) == 1, "once, not once per copy"


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("seed: [0, 1]", "seed: [0, x]", "seed: [", "stages.train.foreach.seed.1: found 'x'"),
        (
            "d_ff: 128",
            "d_fff: 128",
            "swa: {",
            "stages.train.foreach.model.swa.d_fff: unknown key. Did you mean 'd_ff'?",
        ),
        ("num_heads: 2", "num_head: 2", "model: {d_model", "stages.train.model.num_head: unknown key."),
        ("max_steps: 10", "max_steps: ten", "max_steps", "stages.train.max_steps: found 'ten'"),
        ("seed: [0, 1]", "seed: []", "seed: [", "stages.train.foreach.seed: found []"),
        (
            "swa: {",
            "bm.ojo: {}\n        bm_ojo: {",
            "swa: {",
            "foreach.model.bm_ojo: {} and {'d_ff': 128, 'pattern': 'swa*",
        ),
        (
            "trained: train[*]",
            "trained: train[x=1]",
            "trained: ",
            "stages.report.needs.trained: 'train[x=1]': 'x' is no",
        ),
        (
            "evaluated: evaluate[*]",
            "evaluated: tokens[*]",
            "evaluated: ",
            "stages.report.needs.evaluated: 'tokens[*]': ",
        ),
        ("needs: [train, tokens]", "needs: [trian, tokens]", "needs: [train, ", "there is no stage 'trian'"),
        ("name: tiny", "name: tiny\nx: 1", "", "x: unknown key"),
    ],
)
def test_a_mistake_of_the_file_has_its_line(pipeline_file: Path, old: str, new: str, line: str, expected: str) -> None:
    assert PIPELINE.count(old) == 1
    pipeline_file.write_text(PIPELINE.replace(old, new))
    number = (line_of(line) if line else 2) + new.count("\n") * bool(line)
    message = refusal(pipeline_file)
    assert message.startswith(f"{pipeline_file}:{number}: ")
    assert expected in message


def test_a_field_that_two_stages_vary_is_ambiguous(pipeline_file: Path) -> None:
    override = "report.needs.trained='train[seq_len=64]'"
    message = refusal(pipeline_file, "tokens.foreach.seq_len=[64]", "train.foreach.seq_len=[64]", override)
    assert "'train[seq_len=64]': 'seq_len' may be tokens.seq_len or train.seq_len." in message


def test_all_copies_are_too_many_for_a_role_of_one(pipeline_file: Path) -> None:
    overrides = ["evaluate.needs={trained: 'train[*]', tokens: tokens}", "report.needs.evaluated=evaluate"]
    expected = "stages.evaluate.needs.trained: found 4 stages of kind train, expected at most 1."
    assert refusal(pipeline_file, *overrides).startswith(f"override {overrides[0]!r}: {expected}")


def test_a_mistake_in_some_copies_says_in_which(pipeline_file: Path) -> None:
    assert "(In train-bmojo-0-12 and 3 more.)" in refusal(pipeline_file, "train.foreach.warmup_steps=[2, 12]")
    assert "(In " not in refusal(pipeline_file, "train.warmup_steps=12")


@pytest.mark.parametrize(
    ("names", "field"),
    [("{a-b: {}, a: {}}", "{c: 0, b-c: 1}"), ("{a: {}, a-0: {}}", "{0-1: 0, '1': 1}")],
)
def test_copies_whose_names_collide_are_refused(pipeline_file: Path, names: str, field: str) -> None:
    message = refusal(
        pipeline_file, "train.model.pattern=swa*2", f"train.foreach.model={names}", f"train.foreach.seed={field}"
    )
    assert (
        "which a copy of 'train' has. Rename a stage, or name the values of train: foreach: {seed: {NAME: " in message
    )


def test_a_copy_with_the_name_of_a_stage_is_refused(pipeline_file: Path) -> None:
    pipeline_file.write_text(PIPELINE.replace("  tokens:", "  train-swa-1:").replace("tokens]", "train-swa-1]"))
    expected = "stages.train.foreach: a copy would have the name 'train-swa-1', which another stage has."
    assert f"{pipeline_file}:{line_of('foreach')}: {expected}" in refusal(pipeline_file)


def test_overrides_are_of_stages_as_written(pipeline_file: Path) -> None:
    overrides = [
        "train.lr=1e-4",
        "train.model.d_ff=64",
        "train.foreach.seed=[5]",
        "train.foreach.model.swa.window_size=16",
    ]
    stages = load_pipeline(pipeline_file, overrides).stages
    bmojo, swa = stages["train-bmojo-5"], stages["train-swa-5"]
    assert (bmojo.lr, swa.lr) == (1e-4, 1e-4)
    assert (bmojo.model.d_ff, swa.model.d_ff) == (64, 128), "the values of `foreach` are laid over the stage's"
    assert (bmojo.model.window_size, swa.model.window_size) == (32, 16)
    assert "train-bmojo-0" not in stages


def test_an_override_may_add_a_field(pipeline_file: Path) -> None:
    overrides = ["train.backend.kind=deepspeed", "train.foreach.backend.zero_stage=[1, 2]"]
    stages = load_pipeline(pipeline_file, overrides).stages
    assert stages["train-swa-1-2"].backend.zero_stage == 2
    evaluate = load_pipeline(pipeline_file, ["evaluate.foreach.step=[1, 4]"]).stages
    assert evaluate["evaluate-swa-1-4"].needed == ("train-swa-1", "tokens")
    again = load_pipeline(pipeline_file, [*overrides, "train.foreach.backend.zero_stage.0=3"]).stages
    assert again["train-swa-1-3"].backend.zero_stage == 3


def test_a_deeper_field_is_laid_over_a_shallower_one(pipeline_file: Path) -> None:
    values = "{model.window_size: [16, 32], model: {a: {pattern: swa, window_size: 64}}}"
    stages = load_pipeline(pipeline_file, [f"train.foreach={values}"]).stages
    assert stages["train-16-a"].model.window_size == 16
    assert stages["train-32-a"].model.window_size == 32


VARIANTS = "train.foreach={variant: {a: {lr: 1e-2, model.d_ff: 64}, b: {model: {pattern: swa*2}}}, seed: [0, 1]}"


def test_a_variant_is_a_field_of_several_fields(pipeline_file: Path) -> None:
    overrides = [VARIANTS, "train.model.pattern=bmojo*2", "train.lr=1e-3", "train.foreach.variant.b.weight_decay=0.2"]
    overrides.append("report.needs=['train[variant=b]', 'evaluate[variant=b]']")
    stages = load_pipeline(pipeline_file, overrides).stages
    a, b = stages["train-a-1"], stages["train-b-0"]
    assert (a.lr, a.model.d_ff, a.model.pattern, a.seed) == (1e-2, 64, "bmojo*2", 1)
    assert (b.lr, b.model.d_ff, b.model.pattern, b.weight_decay) == (1e-3, None, "swa*2", 0.2)
    assert stages["report"].needed == ("train-b-0", "train-b-1", "evaluate-b-0", "evaluate-b-1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("variant.c={lrr: 1}", "stages.train.foreach.variant.c.lrr: unknown key. Did you mean 'lr'?"),
        ("variant.c={model: {d_fff: 1}}", "stages.train.foreach.variant.c.model.d_fff: unknown key."),
        ("variant.c={lr: fast}", "stages.train.foreach.variant.c.lr: found 'fast', expected a number."),
        ("variant.c={seed: 3}", "stages.train.foreach.variant.c.seed: 'seed' is a field of this `foreach` too."),
        ("variant.c={needs: []}", "stages.train.foreach.variant.c.needs: 'needs' is the same in all copies"),
        ("variant.c={variant: {}}", "stages.train.foreach.variant.c.variant: 'variant' is a field of this"),
        ("variant.c={lr.: 1}", "found 'lr.', expected a field of the stage"),
        ("variant.c=1e-3", "stages.train.foreach.variant.c: found '1e-3', expected a mapping of fields to their"),
        ("variant=[{lr: 1}]", "{'lr': 1} cannot be part of a stage's name. Name the values: variant: {NAME: VALUE"),
    ],
)
def test_a_wrong_variant_is_named(pipeline_file: Path, override: str, expected: str) -> None:
    assert expected in refusal(pipeline_file, VARIANTS, "train.model.pattern=swa", f"train.foreach.{override}")


def test_an_override_of_what_every_variant_sets_has_no_effect(pipeline_file: Path) -> None:
    all_set = "train.foreach={variant: {a: {lr: 1e-2}, b: {lr: 1e-3}}}"
    message = refusal(pipeline_file, all_set, "train.model.pattern=swa", "train.lr=1")
    assert "stages.train.lr: no effect" in message
    assert message.endswith("Set train.foreach.variant.")


def test_no_stage_has_a_field_that_variant_would_hide() -> None:
    assert not [stage.kind for stage in STAGES if VARIANT in stage.config_type.model_fields]


def test_presets_are_values(pipeline_file: Path) -> None:
    overrides = ["tokens.seq_len=2048", "train.foreach.model=[bmojo-130m, swa-1.4b]", "train.model={qk_norm: true}"]
    stages = load_pipeline(pipeline_file, overrides).stages
    assert stages["train-swa-1_4b-0"].model.pattern.startswith("swa*")
    assert stages["train-bmojo-130m-0"].model.qk_norm


def test_a_report_per_copy_and_one_of_a_subset(pipeline_file: Path) -> None:
    each = load_pipeline(pipeline_file, ["report.needs=[train, evaluate]"]).stages
    assert each["report-swa-1"].needed == ("train-swa-1", "evaluate-swa-1")
    some = load_pipeline(pipeline_file, ["report.needs=['train[seed=1]', 'evaluate[seed=1]']"]).stages
    assert some["report"].needed == ("train-bmojo-1", "train-swa-1", "evaluate-bmojo-1", "evaluate-swa-1")


NAMES = st.sampled_from(
    ["seed", "lr", "model", "model.d_ff", "variant", "needs", "x", "", "a.b", "train", "train[*]", "train[seed=0]"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | NAMES
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["foreach", "needs", "model"]), VALUES, VALUES)
def test_whatever_is_written_is_accepted_or_explained(field: str, train: Any, report: Any) -> None:
    raw = yaml.safe_load(PIPELINE)
    raw["stages"]["train"][field] = train
    raw["stages"]["report"]["needs"] = report
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.yaml"
        file.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
        with contextlib.suppress(ConfigError):
            load_pipeline(file)


@pytest.mark.ci
@pytest.mark.parametrize(
    "file", [*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("reproduce/*.yaml")), None], ids=str
)
def test_the_schema_accepts_what_is_valid(file: Path | None) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text() if file else PIPELINE), pipeline_schema())


@pytest.mark.parametrize(
    "change",
    [
        ("seed: [0, 1]", "seed: []"),
        ("seed: [0, 1]", "seed: [0, 0]"),
        ("seed: [0, 1]", "seed: 0"),
        ("seed: [0, 1]", "sed: [0, 1]"),
        ("seed: [0, 1]", "kind: [train]"),
        ("seed: [0, 1]", "variant: [a, b]"),
        ("seed: [0, 1]", "variant: {a: {sed: 0}}"),
        ("trained: train[*]", "trained: train[*"),
    ],
)
def test_the_schema_refuses_what_is_not(change: tuple[str, str]) -> None:
    assert PIPELINE.count(change[0]) == 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(PIPELINE.replace(*change)), pipeline_schema())


def test_the_schema_asks_for_required_fields_that_no_foreach_may_have() -> None:
    raw = yaml.safe_load(PIPELINE)
    del raw["stages"]["train"]["model"]
    jsonschema.validate(raw, pipeline_schema())
    del raw["stages"]["train"]["foreach"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, pipeline_schema())


def test_the_schema_knows_deeper_fields() -> None:
    deeper = PIPELINE.replace("seed: [0, 1]", "model.window_size: {small: 16, large: 32}")
    jsonschema.validate(yaml.safe_load(deeper), pipeline_schema())
    variants = PIPELINE.replace("seed: [0, 1]", "variant: {a: {seed: 0, model.window_size: 32}, b: {}}")
    jsonschema.validate(yaml.safe_load(variants), pipeline_schema())
