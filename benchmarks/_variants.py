"""The models of a finished run with `foreach`: each over its seeds, and its differences to another one, seed by seed.

A seed gives all models the same batches in the same order, so what it shares between them is not in the intervals.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bmojo.counting import count
from pipelines.api.results import output_of, stage_record
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


class _Trained(NamedTuple):
    variant: str
    seed: int


def variants_of(run_name: str, storage: str, figure: str, templates: Iterable[str] = ("train",)) -> dict[str, Variant]:
    """By the values of `foreach` but the seed, in the order of the run; those without the figure are absent.

    Args: figure: of evaluations, such as text/loss, or of training, such as valid/loss. templates: train stages as
        they are written in the pipeline file.
    Raises: UserError: there is no such run, or a record is damaged.
    """
    run = find_run(open_storage(storage), run_name)
    stages = run.stored_state().stages
    records = {name: record for name, state in stages.items() if (record := stage_record(run, state)) is not None}
    variants: dict[str, Variant] = {}
    trained: dict[str, _Trained] = {}  # by fingerprint
    for name, record in records.items():
        template, _, values = name.partition("-")
        output = output_of(record)
        if template not in templates or not isinstance(output, TrainOutput):
            continue
        config = TrainStageConfig.model_validate(record.config)
        found = trained[record.fingerprint] = _Trained(values.removesuffix(f"-{config.seed}"), config.seed)
        counts = count(config.model.replace(vocab_size=output.vocab_size), output.seq_len)
        variants[found.variant] = variants.get(found.variant) or Variant(
            state_bytes=counts.state_bytes, num_params=counts.num_params, lr=config.lr
        )
        if figure in output.figures():
            variants[found.variant].figures[config.seed] = output.figures()[figure]
    for record in records.values():
        output = output_of(record)
        of = next((trained[one] for one in record.inputs.values() if one in trained), None)
        if of is None or not isinstance(output, EvaluateOutput):
            continue
        variant = variants[of.variant]
        for result in output.results:
            for curve in result.curves:
                if curve.name == BY_POSITION:
                    variant.curves[of.seed] = curve
        if (known := output.figure(figure)) is not None:
            variant.figures[of.seed], variant.better = known.value, known.better
    return {name: variant for name, variant in variants.items() if variant.figures}


def ranked(variants: Mapping[str, Variant]) -> list[str]:
    """The best first."""
    sign = {"lower": 1, "higher": -1}
    return sorted(variants, key=lambda name: sign[variants[name].better] * variants[name].mean)


def table(variants: Mapping[str, Variant], baseline: str, title: str) -> str:
    """Markdown: best first, with the paired 95 % interval (Student's) of the difference to the baseline."""
    lines = [
        f"| model | {title} | by seed | minus {baseline}, 95 % interval | learning rate | state, bytes | parameters |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for name in ranked(variants):
        one = variants[name]
        by_seed = ", ".join(f"{one.figures[seed]:.3f}" for seed in sorted(one.figures))
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
