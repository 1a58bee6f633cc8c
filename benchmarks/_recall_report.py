"""The report of benchmarks/recall.py: a Markdown page, a plot and the raw figures, from the records of its runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#000000", "#56B4E9", "#0072B2", "#009E73", "#999999", "#E69F00", "#D55E00", "#CC79A7", "#F0E442")
Records = dict[str, list[dict[str, Any]]]


def write(records: Iterable[dict[str, Any]], order: Sequence[str], report: Path, command: str) -> None:
    """Write `report`.md, .png and .json. Models come in `order`; `command` is what makes the records.

    Raises: ValueError: there are no records, or they are of different settings.
    """
    records = list(records)
    if not records:
        raise ValueError("no run has finished; there is nothing to report.")
    if any(record["settings"] != records[0]["settings"] for record in records):
        raise ValueError("the runs are of different settings; give each setting its own --out.")
    by_model = {name: [record for record in records if record["model"] == name] for name in order}
    by_model = {name: found for name, found in by_model.items() if found}
    report.parent.mkdir(parents=True, exist_ok=True)
    report.with_name(report.name + ".json").write_text(json.dumps(records) + "\n")
    _plot(by_model).savefig(report.with_name(report.name + ".png"))
    report.with_name(report.name + ".md").write_text(_page(by_model, report.name, command))


def _page(by_model: Records, name: str, command: str) -> str:
    first = next(iter(by_model.values()))[0]
    settings = first["settings"]
    parts = [
        f"# Associative recall beyond the window ({name.rpartition('_')[2]})",
        f"Command: `{command}`. CPU, float32, one thread per run. "
        f"torch {first['torch']}, Python {platform.python_version()}, {platform.machine()}.",
        f"Task: {settings['num_pairs']} pairs of key and value at the start of {settings['seq_len']} tokens "
        f"(vocabulary {settings['vocab_size']}), the rest "
        f"{'random values' if settings['noise'] else 'one filler id'}. {settings['num_queries']} queries per sequence, "
        f"each at least {settings['min_distance']} tokens behind its value "
        f"({settings['min_distance'] / settings['window_size']:g} windows). Guessing a value gives "
        f"{2 / settings['vocab_size']:.3f}.",
        f"Every model has 2 layers, d_model {settings['d_model']}, no feed-forward, {settings['num_heads']} heads, "
        f"W = C = {settings['window_size']}, M = {settings['num_eidetic']}, d_state {settings['d_state']}, and initial "
        f"weights of standard deviation {settings['init_std']:g}. Training: {settings['steps']} steps of batch "
        f"{settings['batch_size']}, AdamW, peak learning rate {settings['lr']:g}, the same batches for a seed. Tested "
        f"on {settings['num_test']} sequences.",
        f"![Accuracy over steps and by distance]({name}.png)",
        "## Accuracy at the queries",
        _accuracy_table(by_model),
        "## What the memories held when the queries came",
        "- Kept: share of the tokens of a kind that were in the layer's eidetic set, mean over queries and seeds.\n"
        "- Chance: M over the candidates at that time.\n"
        "- Surprise: mean percentile of the innovation score in its sequence (0.5: like any token).\n"
        "- Mass: share of attention at the queries.\n"
        "- Kept or dropped: accuracy at queries whose value the layer held or not.",
        _memory_table(by_model),
        "## What the queries read",
        "Accuracy if the pairs, or the noise tokens behind them, are removed from the last layer's eidetic set at test "
        "time. A noise token can stand for pairs. The first layer has written into it what its window and its "
        "state-space model held at that time.",
        _interventions_table(by_model),
        "## Every run",
        _runs_table(by_model),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_table(by_model: Records) -> str:
    rows = []
    for name, runs in by_model.items():
        final = [run["curve"][-1]["accuracy"] for run in runs]
        rows.append(
            [name, f"**{mean(final):.3f}**", f"{min(final):.3f} to {max(final):.3f}", str(len(final)),
             f"{runs[0]['num_params']:,}", f"{runs[0]['state_bytes']:,}", _first_step_above(runs, 0.5)]
        )  # fmt: skip
    head = ["model", "accuracy", "range", "seeds", "parameters", "decoding state, bytes", "step at which 0.5 is passed"]
    return _table(head, rows)


def _first_step_above(runs: list[dict[str, Any]], level: float) -> str:
    steps = [next((str(p["step"]) for p in run["curve"] if p["accuracy"] > level), "never") for run in runs]
    return ", ".join(steps)


def _memory_table(by_model: Records) -> str:
    rows = []
    for name, runs in by_model.items():
        for index in range(len(runs[0]["curve"][-1]["layers"])):
            layers = [run["curve"][-1]["layers"][index] for run in runs]
            mass = " / ".join(f"{mean(layer['mass'][i] for layer in layers):.2f}" for i in range(3))
            row = [name, str(index + 1), mass]
            if "kept" in layers[0]:
                row += [f"{_mean_of(layers, 'kept', kind):.2f}" for kind in ("value", "key", "noise")]
                row += [f"{_chance(runs[0]['settings']):.2f}"]
                row += [" / ".join(f"{_mean_of(layers, 'surprise', kind):.2f}" for kind in ("value", "key", "noise"))]
                row += [_optional_mean(layer["accuracy_if_kept"] for layer in layers)]
                row += [_optional_mean(layer["accuracy_if_dropped"] for layer in layers)]
            else:
                row += ["-"] * 7
            rows.append(row)
    head = ["model", "layer", "mass: window / fading / eidetic", "values kept", "keys kept", "noise kept", "chance",
            "surprise: value / key / noise", "accuracy if kept", "if dropped"]  # fmt: skip
    return _table(head, rows)


def _chance(settings: dict[str, Any]) -> float:
    """Mean over query positions of M / candidates, where queries are spread evenly."""
    window = settings["window_size"]
    first = 2 * settings["num_pairs"] - 1 + settings["min_distance"]
    candidates = [t // window * window - window + 1 for t in range(first, settings["seq_len"])]
    return mean(min(1.0, settings["num_eidetic"] / max(1, number)) for number in candidates)


def _mean_of(layers: list[dict[str, Any]], figure: str, kind: str) -> float:
    return mean(layer[figure][kind] for layer in layers)


def _optional_mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.2f}" if known else "-"


def _interventions_table(by_model: Records) -> str:
    rows = []
    for name, runs in by_model.items():
        if runs[0]["interventions"]:
            figures = [mean(run["interventions"][kind] for run in runs) for kind in ("without pairs", "without noise")]
            whole = mean(run["curve"][-1]["accuracy"] for run in runs)
            rows.append([name, *(f"{figure:.3f}" for figure in (whole, *figures))])
    return _table(["model", "as it is", "without pairs", "without noise"], rows)


def _runs_table(by_model: Records) -> str:
    rows = []
    for name, runs in by_model.items():
        for run in runs:
            last = run["curve"][-1]
            kept = ", ".join(f"{layer['kept']['value']:.2f}" for layer in last["layers"] if "kept" in layer) or "-"
            rows.append([name, str(run["seed"]), f"{last['accuracy']:.3f}", kept, f"{run['cpu_time_s']:.0f}"])
    return _table(["model", "seed", "accuracy", "values kept, by layer", "CPU time, s"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot(by_model: Records) -> Figure:
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    over_steps, by_distance = figure.subplots(1, 2, sharey=True)
    for (name, runs), colour in zip(by_model.items(), cycle(COLOURS)):
        for run in runs:
            points = [(point["step"], point["accuracy"]) for point in run["curve"]]
            over_steps.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.8)
        steps = [point["step"] for point in runs[0]["curve"]]
        middle = [mean(run["curve"][i]["accuracy"] for run in runs) for i in range(len(steps))]
        over_steps.plot(steps, middle, color=colour, label=name, linewidth=1.8)
        last = [run["curve"][-1]["accuracy_by_distance"] for run in runs]
        distances = sorted(last[0], key=int)
        values = [mean(run[distance] for run in last) for distance in distances]
        positions = [int(distance) for distance in distances]
        by_distance.plot(positions, values, color=colour, marker="o", markersize=4)
    _finish(over_steps, "Accuracy at the queries (thin: each seed)", "step")
    _finish(by_distance, "By distance from the value, at the end", "distance (tokens, bins of 8)")
    over_steps.legend(fontsize=8, frameon=False)
    over_steps.set_ylim(-0.02, 1.02)
    return figure


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
