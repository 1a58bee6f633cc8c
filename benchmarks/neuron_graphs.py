"""What a compiler for Neuron would be given of each model at 130M: operators, sizes, StableHLO, agreement on XLA's CPU.

    python -m benchmarks.neuron_graphs [--models bmojo mamba2] [--lower] [--out PAGE.md]

Nothing here runs on a device. --lower also asks torch-mlir and XLA (`make neuron-checks`). What is printed is the whole
page, benchmarks/neuron_graphs_2026-11-28.md.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from bmojo import ModelConfig
from pipelines.neuron.checks.graphs import LOSS, Graph, findings, graphs_of
from pipelines.neuron.checks.lowering import Lowered, lower
from pipelines.neuron.checks.op_table import op_table
from pipelines.neuron.checks.sharded import sharded_graphs_of

MODELS = (
    "bmojo", "bmojo_f", "mamba2", "swa", "attention",
    "bmojo_gated_deltanet", "gated_deltanet", "kda", "mamba3", "samba",
)  # fmt: skip
VOCABULARY, SEQ_LEN, BATCH = 50304, 2048, 1
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "models"


def model(name: str) -> ModelConfig:
    """A 130M model of configs/models."""
    fields = yaml.safe_load((CONFIGS / f"{name}-130m.yaml").read_text(encoding="utf-8"))
    return ModelConfig(**fields, vocab_size=VOCABULARY)


def rows(name: str, graphs: Sequence[Graph], lowered: Sequence[Lowered]) -> Iterator[str]:
    """A line of the table per graph."""
    found = {(item.graph, item.precision): item for item in lowered}
    for graph in graphs:
        if graph.part == LOSS and name != MODELS[0]:
            continue  # that of every model of this width and vocabulary
        sizes, numbers = found.get((graph.name, "bfloat16")), found.get((graph.name, "float32"))
        text = "" if sizes is None else sizes.failure or f"{(sizes.bytes or 0) / 1000:.0f} kB"
        error = "" if numbers is None else numbers.failure or f"{numbers.error:.1e}"
        yield f"| {name} | {graph.name} | {graph.num_nodes} | {graph.largest / 2**20:.0f} MiB | {text} | {error} |"


def verdict(name: str, graphs: Sequence[Graph], sharded: Sequence[Graph]) -> str:
    """Whether both ways to hold parameters pass, in words."""
    lines = [f"zero1: {line}" for line in findings(graphs, op_table())]
    lines += [f"fsdp2: {line}" for line in findings(sharded, op_table())]
    same = {g.name: g.ops for g in graphs} == {g.name: g.ops for g in sharded}
    checked = "; ".join(lines) or "nothing found under zero1 and fsdp2"
    return f"- {name}: {checked}. Their graphs have {'the same' if same else 'different'} operators."


def command(arguments: argparse.Namespace) -> str:
    """As it was given."""
    chosen = [] if tuple(arguments.models) == MODELS else ["--models", *arguments.models]
    return " ".join(["python -m benchmarks.neuron_graphs", *chosen, *(["--lower"] if arguments.lower else [])])


def lowering_words() -> list[str]:
    """Which versions lowered and ran the graphs, and what the last two columns are."""
    pinned = (ROOT / "constraints-neuron.txt").read_text(encoding="utf-8").splitlines()
    versions = [line.replace("==", " ") for line in pinned if line.startswith(("torch-mlir==", "jax=="))]
    return [
        f"{', '.join(reversed(versions))}. StableHLO is that of the bf16 graph, as text. The largest error of XLA's",
        "outputs in float32 is relative to the largest number of each output.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lower", action="store_true", help="also lower and run the graphs: minutes per model")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    arguments = parser.parse_args()
    table, verdicts, ops = list[str](), list[str](), Counter[str]()
    for name in arguments.models:
        config = model(name)
        graphs = graphs_of(config, SEQ_LEN, BATCH, documents=True)
        lowered = lower(config, SEQ_LEN, BATCH) if arguments.lower else []
        table += rows(name, graphs, lowered)
        verdicts.append(verdict(name, graphs, sharded_graphs_of(config, SEQ_LEN, BATCH, documents=True)))
        for graph in graphs:
            ops += graph.ops
    page = [
        "# Graphs for a NeuronCore (28 November 2026)",
        "",
        "Nothing here ran on Trainium. What a compiler would be given of each model at 130M, read and lowered on a",
        f"CPU; `{command(arguments)}` writes this page.",
        "",
        f"torch {torch.__version__}, one layer per mixer, {BATCH} x {SEQ_LEN} tokens in two documents, bf16 autocast.",
        *(lowering_words() if arguments.lower else ()),
        "",
        "| model | graph | nodes | largest tensor | StableHLO | XLA:CPU against torch, float32 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *table,
        "",
        *verdicts,
        "",
        "Operators of all graphs:",
        "",
        "```text",
        *textwrap.wrap(" ".join(sorted(ops)), 110, break_long_words=False, break_on_hyphens=False),
        "```",
    ]
    if arguments.out is None:
        print("\n".join(page))
    else:
        arguments.out.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
