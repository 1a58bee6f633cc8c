"""The recipes that compare models: parameters and states are equal to 2 %, and what one trains others reuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bmojo import ModelConfig
from bmojo.counting import ModelCounts, count
from data.config import SyntheticSource
from pipelines.config import PipelineConfig
from pipelines.loading import load_pipeline
from pipelines.stages.tokenize.stage import TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStageConfig
from pipelines.stages.train.config import TrainStageConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(recipe: str) -> PipelineConfig:
    return load_pipeline(CONFIGS / f"{recipe}.yaml")


def trained(pipeline: PipelineConfig, template: str) -> dict[str, TrainStageConfig]:
    """The train stages made of a template, by the values of its `foreach`."""
    return {
        name.removeprefix(f"{template}-"): stage
        for name, stage in pipeline.stages.items()
        if isinstance(stage, TrainStageConfig) and name.partition("-")[0] == template
    }


def models(pipeline: PipelineConfig, template: str) -> dict[str, ModelConfig]:
    """Those of seed 0, by their names."""
    return {name.removesuffix("-0"): one.model for name, one in trained(pipeline, template).items() if one.seed == 0}


def seq_len_of(pipeline: PipelineConfig, template: str) -> int:
    (name,) = {need for stage in trained(pipeline, template).values() for need in stage.needs}
    tokens = pipeline.stages[name]
    assert isinstance(tokens, TokenizeStageConfig)
    return tokens.seq_len


def counted(pipeline: PipelineConfig, template: str) -> dict[str, ModelCounts]:
    tokenizer, seq_len = pipeline.stages["tokenizer"], seq_len_of(pipeline, template)
    assert isinstance(tokenizer, TokenizerStageConfig)
    return {
        name: count(model.replace(vocab_size=tokenizer.vocab_size), seq_len)
        for name, model in models(pipeline, template).items()
    }


def task_stages() -> Iterator[tuple[str, TokenizeStageConfig]]:
    """All stages of recipes that write documents of a task."""
    for recipe in sorted(CONFIGS.glob("reproduce/*.yaml")):
        for name, stage in load_pipeline(recipe).stages.items():
            if isinstance(stage, TokenizeStageConfig) and isinstance(stage.source, SyntheticSource):
                yield f"{recipe.stem}/{name}", stage


def spread(values: list[int]) -> float:
    return max(values) / min(values)


@pytest.mark.parametrize(("recipe", "template"), [("compare", "train"), ("compare-gpu", "train_29m")])
def test_compared_models_have_equal_parameters_and_states(recipe: str, template: str) -> None:
    counts = counted(load(recipe), template)
    assert len(counts) == 9
    assert spread([one.num_params for one in counts.values()]) <= 1.02
    attention = counts.pop("attention")
    assert spread([one.state_bytes for one in counts.values()]) <= 1.02
    assert attention.state_bytes > 2 * counts["swa"].state_bytes, "it grows, and stands for what keeps everything"


@pytest.mark.parametrize(
    ("recipe", "template"), [("ablate", "train"), ("ablate", "train_longer"), ("compare-gpu", "train_116m")]
)
def test_other_compared_models_have_equal_parameters(recipe: str, template: str) -> None:
    assert spread([one.num_params for one in counted(load(recipe), template).values()]) <= 1.02


@pytest.mark.parametrize(
    ("recipe", "template"),
    [("compare", "train"), ("ablate", "train"), ("compare-gpu", "train_29m"), ("compare-gpu", "train_116m")],
)
def test_no_window_sees_a_whole_sequence(recipe: str, template: str) -> None:
    """Else sliding-window attention would be full attention."""
    pipeline = load(recipe)
    windows = {name: model.window_size for name, model in models(pipeline, template).items() if "swa" in model.pattern}
    assert windows
    assert all(window < seq_len_of(pipeline, template) for window in windows.values()), windows


@pytest.mark.parametrize(
    ("recipe", "template"), [("compare", "train"), ("compare-gpu", "train_29m"), ("compare-gpu", "train_116m")]
)
def test_every_compared_model_has_three_seeds(recipe: str, template: str) -> None:
    pipeline = load(recipe)
    assert {name.rpartition("-")[2] for name in trained(pipeline, template)} == {"0", "1", "2"}
    assert len(trained(pipeline, template)) == 3 * len(models(pipeline, template))


def test_larger_models_of_the_sweep_are_those_of_the_comparison() -> None:
    compared = models(load("compare-gpu"), "train_29m")
    swept = trained(load("compare-gpu-rates"), "train")
    assert {name.partition("-")[0]: stage.model for name, stage in swept.items()} == compared


def test_documents_of_tasks_fit_into_a_sequence() -> None:
    """With their end. Cut documents ask for what is not there, and what is left of them counts as a sequence."""
    stages = dict(task_stages())
    assert {name.partition("/")[0] for name in stages} == {"drift", "mad", "memory", "recall", "selection"}
    for name, stage in stages.items():
        assert isinstance(stage.source, SyntheticSource)
        rng = np.random.default_rng(0)
        longest = max(len(stage.source.task.draw(rng).tokens) for _ in range(1000))
        assert longest + 1 <= stage.seq_len, name
        assert stage.packing == "best_fit", name


def test_the_rates_are_those_of_the_sweep() -> None:
    """Of each model five rates are tried, and the recipe trains at one of them."""
    sweep = trained(load("compare-rates"), "train")
    compared = {name: stage for name, stage in trained(load("compare"), "train").items() if stage.seed == 0}
    for name, stage in compared.items():
        same = [other for other in sweep.values() if other.model == stage.model]
        assert len({other.lr for other in same}) == 5, name
        assert stage in same, "so its training is reused"


def test_an_ablation_shares_what_it_has_in_common_with_the_comparison() -> None:
    ours, theirs = trained(load("ablate"), "train"), trained(load("compare"), "train")
    common = ours.keys() & theirs.keys()
    assert {name.rpartition("-")[0] for name in common} == {"bmojo", "mamba2", "mamba2_bmojo", "swa"}
    for name in common:
        assert ours[name] == theirs[name]
    assert ours["residual_wide-0"] == theirs["bmojo_residual-0"]


def test_rows_of_the_ablation_have_the_rates_of_the_comparison() -> None:
    """Of the three families that it has: what attends, what adds y to the residual stream, and what is Mamba-2."""
    rates = {name: stage.lr for name, stage in trained(load("compare"), "train").items()}
    for name, stage in trained(load("ablate"), "train").items():
        if "mamba2" in stage.model.pattern:
            family = "mamba2_bmojo"
        else:
            family = "bmojo_residual" if stage.model.fading_output == "memory_and_residual" else "bmojo"
        assert stage.lr == rates[f"{family}-0"], name
