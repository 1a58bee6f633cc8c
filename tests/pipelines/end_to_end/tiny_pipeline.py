"""A whole pipeline small enough for tests, run as a user runs it: the `bmojo` command in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.pipelines import forked

PIPELINE = """\
name: tiny
storage: {storage}
stages:
  tokenizer:
    kind: tokenizer
    source: {{kind: files, paths: [{corpus}]}}
    vocab_size: 512
  tokens:
    kind: tokenize
    needs: [tokenizer]
    source: {{kind: files, paths: [{corpus}]}}
    seq_len: 64
    validation_fraction: 0.1
    slice_bytes: 4096
    resources: {{num_workers: 2}}
  train:
    kind: train
    needs: [tokens]
    model: {{pattern: bmojo*2, d_model: 32, num_heads: 2, ssm_head_dim: 16, d_state: 16, window_size: 16, chunk_size: 8,
             num_eidetic: 4}}
    global_batch_size: 8
    micro_batch_size: 4
    max_steps: 16
    warmup_steps: 4
    log_every_steps: 1
    checkpoint_every_steps: 4
    validation_batches: 2
    resources: {{num_workers: 2}}
  evaluate:
    kind: evaluate
    needs: [train, tokens]
    measures: [{{kind: text}}, {{kind: position}}, {{kind: samples, max_new_tokens: 16}}]
  report:
    kind: report
    needs: [train, evaluate]
"""
TIMEOUT_S = 420


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    output: str


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline file, its corpus and its storage, all in one folder."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`bmojo ARGUMENTS` as the leader of a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def bmojo(self, *arguments: str) -> Finished:
        """Run a command to its end."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise
        return Finished(process.returncode, output)

    def ask(self, *arguments: str) -> Finished:
        """A command that only reads."""
        ended = forked.bmojo(arguments, self._environment())
        return Finished(ended.code, ended.out + ended.err)

    def run(self, *overrides: str) -> Finished:
        """`bmojo run` on this pipeline."""
        return self.bmojo("run", str(self.file), *overrides)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return kept | {"COLUMNS": "200"}

    def artifact(self, kind: str) -> Path:
        """The one artifact of a kind."""
        (folder,) = (self.storage / "artifacts" / kind).iterdir()
        return folder

    def checkpoints(self) -> list[Path]:
        """Manifests of the finished checkpoints of training."""
        return list(self.storage.glob("artifacts/train/*/checkpoints/step-*/manifest.json"))

    def record(self, kind: str) -> Any:
        """Its record."""
        return json.loads((self.artifact(kind) / "record.json").read_text())

    def points(self, metric: str, stage: str) -> list[tuple[int, float]]:
        """(step, value) of a metric as journalled by the workers of a stage of the one run."""
        journals = sorted(self.storage.glob(f"runs/*/journal/{stage}.*.workers.jsonl"))  # one per driver
        events = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
        return [(event["step"], event["values"][metric]) for event in events if metric in event.get("values", {})]


def write_pipeline(folder: Path) -> TinyPipeline:
    """Write the pipeline file and its corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl")
    pipeline = TinyPipeline(folder)
    pipeline.file.write_text(PIPELINE.format(storage=pipeline.storage, corpus=folder / "corpus.jsonl"))
    return pipeline


def write_corpus(path: Path) -> None:
    """Write 300 documents of made-up sentences, the same every time."""
    rng = random.Random(0)
    words = [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{rng.choice('lmnrst')}" for _ in range(60)]
    with open(path, "w") as file:
        for _ in range(300):
            text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process and everything below it, at once."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=30)
    process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return as soon as the condition holds; fail when the process ends or time runs out before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"ended too soon:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
