"""The models of a finished run with `foreach`: each over its seeds, and its differences to another one, seed by seed.

A seed gives all models the same batches in the same order, so what it shares between them is not in the intervals.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from base.errors import UserError
from base.names import close_names, did_you_mean
from bmojo.counting import count
from pipelines.api.results import output_of, stage_record
from pipelines.engine.events import RunInfo
from pipelines.engine.runs import find_run
from pipelines.stages.evaluate.results import Curve
from pipelines.stages.evaluate.stage import EvaluateOutput
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.stage import TrainOutput
from pipelines.stages.uncertainty import replicates
from pipelines.storage import open_storage

BY_POSITION = "perplexity_by_position"


@dataclass
class Variant:
    """Copies of a train stage that differ by their seed. Figures, and perplexities by position, by seed."""

    figures: dict[int, float] = field(default_factory=dict)
    state_bytes: int = 0
    num_params: int = 0
    lr: float = 0.0
    curves: dict[int, Curve] = field(default_factory=dict)
    better: Literal["lower", "higher"] = "lower"

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.figures.values())


class _Copy(NamedTuple):
    """A copy of a train stage: of which variant, with which seed."""

    variant: str
    seed: int


def variants_of(run_name: str, storage: str, figure: str, templates: Sequence[str] = ("train",)) -> dict[str, Variant]:
    """By the values of `foreach` but the seed, in the order of the run. One without a result has no figures.

    With several templates names have their template, too: train-bmojo.

    Args: figure: of evaluations, such as text/loss, or of training, such as valid/loss. templates: train stages as
        they are written in the pipeline file.
    Raises: UserError: there is no such run, train stage or figure, or a record is damaged.
    """
    run = find_run(open_storage(storage), run_name)
    state = run.stored_state()
    copies = _copies_of(state.info, templates)
    records = {name: record for name, one in state.stages.items() if (record := stage_record(run, one)) is not None}
    variants = {copy.variant: Variant() for copy in copies.values()}
    trained: dict[str, list[_Copy]] = {}  # by fingerprint
    known: set[str] = set()  # figures
    for name, record in records.items():
        output = output_of(record)
        if name not in copies or not isinstance(output, TrainOutput):
            continue
        copy, config = copies[name], TrainStageConfig.model_validate(record.config)
        trained.setdefault(record.fingerprint, []).append(copy)
        counts = count(config.model.replace(vocab_size=output.vocab_size), output.seq_len)
        variant = variants[copy.variant]
        variant.state_bytes, variant.num_params, variant.lr = counts.state_bytes, counts.num_params, config.lr
        known |= output.figures().keys()
        if figure in output.figures():
            variant.figures[copy.seed] = output.figures()[figure]
    for record in records.values():
        output = output_of(record)
        of = [copy for one in record.inputs.values() for copy in trained.get(one, ())]
        if not of or not isinstance(output, EvaluateOutput):
            continue
        known |= {f"{result.name}/{found.name}" for result in output.results for found in result.figures}
        curves = [curve for result in output.results for curve in result.curves if curve.name == BY_POSITION]
        for copy in of:
            variant = variants[copy.variant]
            variant.curves |= {copy.seed: curves[-1]} if curves else {}
            if (found := output.figure(figure)) is not None:
                variant.figures[copy.seed], variant.better = found.value, found.better
    if figure not in known:
        raise UserError(f"No finished stage of run {run.run_id} has the figure {figure!r}.{_nearest(figure, known)}")
    return variants


def _nearest(figure: str, known: Collection[str]) -> str:
    if not known:
        return " None of these trainings is finished yet."
    return f"{did_you_mean(close_names(figure, sorted(known)))} Known: {', '.join(sorted(known))}."


def _copies_of(info: RunInfo, templates: Sequence[str]) -> dict[str, _Copy]:
    """The copies of these train stages, by stage. Raises UserError: the run has no such train stage."""
    seeds = {name: stage["seed"] for name, stage in info.config["stages"].items() if stage["kind"] == "train"}
    found: dict[str, _Copy] = {}
    for template in dict.fromkeys(templates):
        values = {name: name.split("-")[1:] for name in seeds if name.partition("-")[0] == template}
        if not values:
            known = ", ".join(dict.fromkeys(name.partition("-")[0] for name in seeds)) or "none"
            raise UserError(f"Run {info.run_id} has no train stage {template!r}. Its train stages: {known}.")
        place = _place_of_seed([(parts, str(seeds[name])) for name, parts in values.items()])
        for name, parts in values.items():
            if place is not None:
                del parts[place]
            named = [template, *parts] if len(set(templates)) > 1 or not parts else parts
            found[name] = _Copy("-".join(named), seeds[name])
    return found


def _place_of_seed(copies: Sequence[tuple[Sequence[str], str]]) -> int | None:
    """Which value in the names of a template's copies is the seed, as `foreach` may have its fields in any order.

    Args: copies: values and seed of each. Returns: None: they have no seed in their names, or gave it a name.
    """
    fewest = min(len(values) for values, _ in copies)  # a list among the values has several parts
    places = (*range(-1, -fewest - 1, -1), *range(fewest))
    return next((place for place in places if all(values[place] == seed for values, seed in copies)), None)


def seeds_of(variants: Mapping[str, Variant]) -> list[int]:
    """All seeds that any of them has."""
    return sorted({seed for variant in variants.values() for seed in variant.figures})


def ranked(variants: Mapping[str, Variant]) -> list[str]:
    """The best first, and those that lack seeds below all others: a mean over other seeds is no rank among them."""
    sign = {"lower": 1, "higher": -1}
    known = {name: one for name, one in variants.items() if one.figures}
    return sorted(known, key=lambda name: (-len(known[name].figures), sign[known[name].better] * known[name].mean))


def table(variants: Mapping[str, Variant], baseline: str, title: str) -> str:
    """Markdown: best first, with the paired 95 % interval (Student's) of the difference to the baseline."""
    seeds = seeds_of(variants)
    head = f"| model | {title} | by seed ({', '.join(map(str, seeds))}) | minus {baseline}, 95 % interval"
    lines = [
        f"{head} | learning rate | state, bytes | parameters |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for name in ranked(variants):
        one = variants[name]
        by_seed = ", ".join(f"{one.figures[seed]:.3f}" if seed in one.figures else "-" for seed in seeds)
        lines.append(
            f"| {name} | {one.mean:.3f} | {by_seed} | {difference(name, variants, baseline)} | {one.lr:g} | "
            f"{one.state_bytes:,} | {one.num_params:,} |"
        )
    return "\n".join(lines)


def difference(name: str, variants: Mapping[str, Variant], baseline: str) -> str:
    """To the baseline, over the seeds that both have."""
    differences = paired(name, variants, baseline)
    if not differences:
        return "-"
    value, low, high = replicates(differences)
    return f"{value:+.3f}" if low is None or high is None else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def paired(name: str, variants: Mapping[str, Variant], baseline: str) -> list[float]:
    """The differences of the seeds that both have; none of the baseline itself."""
    if name == baseline or baseline not in variants:
        return []
    base, own = variants[baseline].figures, variants[name].figures
    return [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
