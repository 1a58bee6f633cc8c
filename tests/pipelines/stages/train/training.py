"""Parts of a training run that several tests put together: tokens, a context, a journal that is a file."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray.cloudpickle
import torch
from safetensors.torch import load_file

from data.config import FilesSource, TokenizeFields, TokenizerFields
from data.tokenizer import train_tokenizer
from pipelines.engine.stage import StageContext, StageInputs, StageNode, StageResult
from pipelines.stages.tokenize.stage import TokenizeInputs, TokenizeStage, TokenizeStageConfig, _output
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER, TokenizerStage, TokenizerStageConfig
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import NOTICE, Journal
from pipelines.tracking.request import Request
from tests.data.here import tokenize_here

SEQ_LEN = 64
Tokens = StageNode[TokenizeStage]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@dataclass(frozen=True)
class FileSink:
    """A metric sink that writes lines to a file, and can send its own process, rank 0, a signal at a step, once."""

    path: Path
    kill_at_step: int | None = None
    signal: int = signal.SIGKILL

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid(), **values}) + "\n")
        killed = self.path.with_suffix(".killed")
        if step == self.kill_at_step and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), self.signal)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"tags": dict(tags)}) + "\n")

    def log_notice(self, text: str) -> None:
        self.log_tags({NOTICE: text})

    def flush(self) -> bool:
        return True

    def request(self) -> Request:
        return Request.NONE

    def ask(self, request: Request) -> None:
        raise AssertionError(f"nobody hears {request}")

    def points(self, name: str) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [(line["step"], line[name]) for line in lines if name in line]

    def tags(self) -> list[dict[str, str]]:
        """What each call of log_tags brought."""
        return [line["tags"] for line in map(json.loads, self.path.read_text().splitlines()) if "tags" in line]


def write_tokens(folder: Path, name: str = "tokens", first: int = 0, seq_len: int = SEQ_LEN) -> Tokens:
    """A tokenize stage's artifact of 60 small documents, others for each `first`; the tokenizer is the same."""
    texts = [_text(number) for number in range(first, first + 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = FilesSource(kind="files", paths=(str(folder / "text.jsonl"),))
    tokenizer = train_tokenizer(map(_text, range(60)), TokenizerFields(source=source, vocab_size=300))
    tokenizer.save(folder / TOKENIZER_FOLDER)
    config = TokenizeStageConfig(kind="tokenize", source=source, seq_len=seq_len, validation_fraction=0.2)
    fields = TokenizeFields(source=source, seq_len=seq_len, validation_fraction=0.2)
    done = tokenize_here(tokenizer, fields, folder)
    output = _output(done.summary, len(done.slices), duplicates=[])
    tokenizer_config = TokenizerStageConfig(kind="tokenizer", source=source, vocab_size=300)
    inputs = TokenizeInputs(StageNode("tokenizer", TokenizerStage(), tokenizer_config, StageInputs()))
    return StageNode(name, TokenizeStage(), config, inputs, StageResult("f" * 64, ArtifactDir.at(folder), output))


def _text(number: int) -> str:
    return " ".join(f"the {n} of {number} is {n * number}" for n in range(20 + number % 7))


def context_of(folder: Path) -> StageContext:
    return StageContext(
        name="train",
        fingerprint="0" * 64,
        artifact=ArtifactDir.at(folder),
        journal=Journal(folder.with_suffix(".journal") / "train.jsonl"),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The final model of a train stage."""
    loaded: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return loaded
