"""Measures taken in this process, on a tiny model and small texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo import BMojoLM
from bmojo.checkpoint_io import save_pretrained
from pipelines.engine.stage import StageNode, StageResult
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.evaluation import equipment_of
from pipelines.stages.evaluate.host import Host
from pipelines.stages.evaluate.language_model import LanguageModel, TextTokenizer
from pipelines.stages.evaluate.measures import measure_of
from pipelines.stages.evaluate.measures.measure import MeasureConfig, Measured, Setting
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.stage import TrainInputs, TrainOutput, TrainStage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.train.training import Tokens
from tests.pipelines.stages.trained_run import tiny_model


def trained_on(folder: Path, *tokens: Tokens, name: str = "train") -> StageNode[TrainStage]:
    """A finished stage with a tiny model that nobody trained."""
    model: BMojoLM = tiny_model()
    model.init_weights(seed=1)
    save_pretrained(model, folder / "train" / "model")
    config = TrainStageConfig.model_validate(
        {"kind": "train", "model": model.config, "global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1}
        | {"warmup_steps": 0}
    )
    output = TrainOutput(
        num_params=1, steps=1, tokens_seen=1, final_train_loss=1.0, initial_valid_loss=None, final_valid_loss=None,
        train_time_s=1.0, tokens_per_s=1.0, mfu=None, model="model", history="", tokenizer=None, seq_len=64,
        vocab_size=320,
    )  # fmt: skip
    result = StageResult("0" * 64, ArtifactDir.at(folder / "train"), output)
    return StageNode(name, TrainStage(), config, TrainInputs(tokens), result)


@dataclass(frozen=True)
class GivenModel:
    """A subject that is there already."""

    model: LanguageModel
    own_tokenizer: TextTokenizer | None = None

    def load(self, on_gpu: bool) -> LanguageModel:
        return self.model

    def untrained(self, like: LanguageModel | None, on_gpu: bool) -> LanguageModel:
        return self.model

    def tokenizer(self) -> TextTokenizer | None:
        return self.own_tokenizer


def setting_of(*tokens: Tokens, **fields: Any) -> Setting:
    """Of an evaluation on these texts. Args: fields: of its settings."""
    config = EvaluateStageConfig.model_validate({"kind": "evaluate", **fields})
    return Setting(config, "evaluate", tokens, trained=None)


def measure_here(
    config: MeasureConfig, setting: Setting, model: LanguageModel, own_tokenizer: TextTokenizer | None = None
) -> Measured:
    """All tasks, one after the other in one host, and what they amount to."""
    host = Host(equipment_of(setting, GivenModel(model, own_tokenizer)))
    measure = measure_of(config)
    return measure.reduce(config, setting, {task.key: host.do(task.work) for task in measure.tasks(config, setting)})
