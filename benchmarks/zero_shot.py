"""Zero-shot tasks through the native path and through lm-eval's `hf` type on the exported model, task by task.

`python -m benchmarks.zero_shot DATA [--model FOLDER --tokenizer FOLDER] [--limit 200]` prints a table. DATA is a folder
of examples in the forms of pipelines/stages/evaluate/harness/local_tasks.py. Without --model: a small random model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.checkpoint_io import load_pretrained
from bmojo.hf import export_to_hf
from data.config import PythonStdlibSource, TokenizerFields
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from pipelines.stages.evaluate.harness.lm import HarnessLM
from pipelines.stages.evaluate.harness.tasks import LoadedTask, load_tasks, metrics_of
from pipelines.stages.evaluate.language_model import NativeModel

BATCH_TOKENS = 4096
TASKS = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
_TEXT = "The sky is blue. The grass is green. Question: why is water wet? Answer: it is water. "


class Pair(NamedTuple):
    """A model of ours with its tokenizer, and the folder that it was exported to."""

    model: BMojoLM
    tokenizer: Tokenizer
    exported: Path


class Row(NamedTuple):
    """A metric of a task by both paths.

    Attributes:
        num_different_answers: examples whose value differs: 0 or 1 for accuracies.
        largest_difference: of the log-probabilities, in nats; 0 for texts.
    """

    task: str
    metric: str
    num_examples: int
    native: float
    hf: float
    num_different_answers: int
    largest_difference: float


def small_pair(folder: Path) -> Pair:
    """A random model with a tokenizer of a few merges, exported into `folder`."""
    fields = TokenizerFields(source=PythonStdlibSource(kind="python_stdlib"), vocab_size=280)
    tokenizer = train_tokenizer([_TEXT] * 3, fields)
    config = ModelConfig(
        pattern="bmojo,mamba2", vocab_size=320, d_model=32, num_heads=2, window_size=8, chunk_size=4, num_eidetic=4,
        d_state=8, ssm_head_dim=16, init_std=0.1,
    )  # fmt: skip
    return export_pair(BMojoLM(config).eval(), tokenizer, folder)


def export_pair(model: BMojoLM, tokenizer: Tokenizer, folder: Path) -> Pair:
    """Export a model with its tokenizer into a new folder."""
    tokenizer.save(folder / "tokenizer")
    export_to_hf(model, folder / "tokenizer" / "tokenizer.json", folder / "exported")
    return Pair(model, tokenizer, folder / "exported")


def compare(pair: Pair, data: Path, tasks: Sequence[str], limit: int | None, num_fewshot: int = 0) -> list[Row]:
    """Every metric of every task by both paths."""
    from lm_eval.models.huggingface import HFLM

    native = HarnessLM(NativeModel(pair.model), pair.tokenizer, BATCH_TOKENS)
    hf = HFLM(pretrained=str(pair.exported), trust_remote_code=True, dtype="float32", device="cpu", batch_size=8)
    rows: list[Row] = []
    for name in tasks:
        (loaded,) = load_tasks([name], data, limit, num_fewshot)
        responses: list[dict[int, list[Any]]] = []
        seconds = []
        for lm in (native, hf):
            start = time.perf_counter()
            responses.append(answers(lm, loaded))
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {len(loaded.examples)} examples, native {seconds[0]:.0f} s, hf {seconds[1]:.0f} s", flush=True)
        difference = max(
            (abs(a[0] - b[0]) for number in responses[0] for a, b in zip(*(r[number] for r in responses), strict=True))
            if loaded.task.OUTPUT_TYPE != "generate_until"
            else [0.0]
        )
        (ours, _), (theirs, _) = (metrics_of(loaded, of_path) for of_path in responses)
        for metric in ours:
            values = [ours[metric], theirs[metric]]
            ratios = [float(value.numerator_n.sum() / value.denominator_n.sum()) for value in values]
            shown = [math.exp(ratio) if values[0].transform == "exp" else ratio for ratio in ratios]
            is_share = metric not in ("perplexity", "bits_per_byte")
            different = int((values[0].numerator_n != values[1].numerator_n).sum()) if is_share else 0
            rows.append(Row(name, metric, len(loaded.examples), *shown, different, difference))
    return rows


def answers(lm: Any, loaded: LoadedTask) -> dict[int, list[Any]]:
    """What a model answers to each request of each example."""
    requests = [request for example in loaded.examples for request in example.requests]
    found = iter(getattr(lm, requests[0].request_type)(requests, disable_tqdm=True))
    return {example.number: [next(found) for _ in example.requests] for example in loaded.examples}


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = "| task | metric | examples | native | `hf` | different answers | largest difference of log-probabilities |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.task} | {row.metric} | {row.num_examples} | {row.native:.4f} | {row.hf:.4f} "
        f"| {row.num_different_answers} | {row.largest_difference:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_shot", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with <task>.jsonl or <task>.jsonl.gz")
    parser.add_argument("--model", type=Path, help="folder of a trained model (save_pretrained)")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=None, help="examples per task")
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            pair = small_pair(Path(folder))
        else:
            pair = export_pair(load_pretrained(options.model).eval(), load_tokenizer(options.tokenizer), Path(folder))
        print(table(compare(pair, options.data, options.tasks, options.limit, options.num_fewshot)))


if __name__ == "__main__":
    main()
