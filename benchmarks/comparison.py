"""The models of a finished comparison over their seeds, each against a baseline: a table, and plots.

    bmojo run configs/compare.yaml
    python -m benchmarks.comparison compare --baseline swa --plot compare.png

Works for any run whose train stages come from `foreach` with a `seed`, such as configs/ablate.yaml and
configs/reproduce/selection.yaml, also before all of them are finished. Prints Markdown: models that lack a seed stand
below the others. With several templates a model's name has its template: `--templates train train_longer --baseline
train-bmojo`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence

from cycler import cycler
from matplotlib.figure import Figure

from base.errors import UserError
from base.names import close_names, did_you_mean
from benchmarks._variants import Variant, paired, ranked, table, variants_of
from pipelines.stages.report.drawing import COLOURS
from pipelines.stages.uncertainty import replicates

_LINES = cycler(linestyle=("-", "--", ":", "-.")) * cycler(color=COLOURS)  # 32 that can be told apart


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and draw the plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="run id, the beginning of one, or a pipeline's name")
    parser.add_argument("--storage", default="runs", help="where it is")
    parser.add_argument("--baseline", required=True, help="the model that the others are compared with")
    parser.add_argument("--figure", default="text/loss", help="a measure and its figure; valid/loss: of training")
    parser.add_argument("--templates", nargs="+", default=["train"], help="train stages as the pipeline file has them")
    parser.add_argument("--plot", help="PNG file: differences to the baseline, and the same by position if measured")
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")


def _compare(options: argparse.Namespace) -> None:
    """Raises UserError: there is no such run, train stage, figure or baseline, or nothing to draw."""
    variants, baseline = variants_of(options.run, options.storage, options.figure, options.templates), options.baseline
    if baseline not in variants:
        near = did_you_mean(close_names(baseline, list(variants)))
        raise UserError(f"--baseline: there is no model {baseline!r}.{near} The models: {', '.join(variants)}.")
    print(table(variants, baseline, options.figure.replace("_", " ")))
    if options.plot:
        if not any(paired(name, variants, baseline) for name in variants):
            raise UserError(f"--plot: no model has a seed in common with {baseline!r} yet: there is nothing to draw.")
        draw(variants, baseline, options.figure).savefig(options.plot)


def draw(variants: Mapping[str, Variant], baseline: str, title: str) -> Figure:
    """Differences to the baseline with their intervals and, of perplexity by position, in nats."""
    names = [name for name in ranked(variants) if paired(name, variants, baseline)]
    by_position = {name: found for name in names if (found := differences_by_position(name, variants, baseline))}
    figure = Figure(figsize=(12.5 if by_position else 6, 1 + 0.28 * max(len(names), 8)), dpi=120, layout="constrained")
    left, *right = figure.subplots(1, 2 if by_position else 1, squeeze=False)[0]
    for row, name in enumerate(reversed(names)):
        differences = paired(name, variants, baseline)
        value, low, high = replicates(differences)
        left.plot(differences, [row] * len(differences), ".", color="#999999", markersize=4)
        if low is not None and high is not None:
            left.plot([low, high], [row, row], color="#0072B2", linewidth=1.5)
        left.plot([value], [row], "o", color="#0072B2", markersize=5)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    left.set_title(f"{title}, minus {baseline}", fontsize=10, loc="left")
    for axes in right:
        axes.set_prop_cycle(_LINES)
        for name, points in reversed(by_position.items()):  # the worst is above all others, and first in the legend
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"Loss by position in the document, minus {baseline} (nats)", fontsize=10, loc="left")
        axes.set_xlabel("position (tokens, ends of bins)")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (left, *right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def differences_by_position(name: str, variants: Mapping[str, Variant], baseline: str) -> list[tuple[float, float]]:
    """(position, nats) as means over the seeds that both have; empty if it was not measured."""
    base, own = variants[baseline].curves, variants[name].curves
    seeds = sorted(base.keys() & own.keys())
    if not seeds:
        return []
    positions = [point.x for point in base[seeds[0]].points]
    losses = [
        [[math.log(point.y) for point in curves[seed].points] for seed in seeds] for curves in (own, base)
    ]  # by seed, by position
    by_position = [zip(*of, strict=True) for of in losses]
    return [
        (position, statistics.fmean(ours) - statistics.fmean(theirs))
        for position, ours, theirs in zip(positions, *by_position, strict=True)
    ]


if __name__ == "__main__":
    main()
