"""The selection rules of a finished run of configs/selection.yaml, each against innovation over the same seeds.

    bmojo run configs/selection.yaml
    python -m benchmarks.selection selection

A seed gives all rules the same batches, initial values and test documents, so differences are taken seed by seed.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from bmojo.counting import count
from pipelines.api.results import output_of, stage_record
from pipelines.engine.runs import find_run
from pipelines.stages.evaluate.stage import EvaluateOutput
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.stage import TrainOutput
from pipelines.stages.uncertainty import replicates
from pipelines.storage import open_storage

BASELINE, FIGURE, SEQ_LEN = "innovation", "mean_recall", 144


@dataclass
class Row:
    """One selection. Accuracies by seed; decoding state and parameters of its model."""

    accuracy: dict[str, float] = field(default_factory=dict)
    state_bytes: int = 0
    num_params: int = 0


def rows_of(name: str, storage: str) -> dict[str, Row]:
    """By selection, in the order of the run. Raises: UserError: there is no such run, or a record is damaged."""
    run = find_run(open_storage(storage), name)
    rows: dict[str, Row] = {}
    for stage, state in run.stored_state().stages.items():
        named = re.fullmatch(r"(train|evaluate)-(\w+)-(\d+)", stage)
        record = None if named is None else stage_record(run, state)
        if named is None or record is None:
            continue
        row, output = rows.setdefault(named[2], Row()), output_of(record)
        if isinstance(output, EvaluateOutput):
            figures = {figure.name: figure.value for result in output.results for figure in result.figures}
            row.accuracy[named[3]] = figures[FIGURE]
        elif isinstance(output, TrainOutput):
            model = TrainStageConfig.model_validate(record.config).model
            counts = count(model.replace(vocab_size=model.vocab_size or 128), SEQ_LEN)
            row.state_bytes, row.num_params = counts.state_bytes, output.num_params
    return {name: row for name, row in rows.items() if row.accuracy}


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: best first, with the paired 95 % interval (Student's) of the difference to the baseline."""
    lines = [
        f"| selection | accuracy | by seed | minus {BASELINE}, 95 % interval | state, bytes | parameters |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -statistics.fmean(item[1].accuracy.values())):
        by_seed = ", ".join(f"{value:.3f}" for _, value in sorted(row.accuracy.items()))
        lines.append(
            f"| {name} | {statistics.fmean(row.accuracy.values()):.3f} | {by_seed} | {difference(name, rows)} | "
            f"{row.state_bytes:,} | {row.num_params:,} |"
        )
    return "\n".join(lines)


def difference(name: str, rows: Mapping[str, Row]) -> str:
    """To the baseline, over the seeds that both have."""
    if name == BASELINE or BASELINE not in rows:
        return "-"
    base, own = rows[BASELINE].accuracy, rows[name].accuracy
    differences = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    if not differences:
        return "-"
    value, low, high = replicates(differences)
    return f"{value:+.3f}" if low is None or high is None else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", default="selection", help="run id, the beginning of one, or a pipeline's name"
    )
    parser.add_argument("--storage", default="runs", help="where it is")
    options = parser.parse_args()
    print(table(rows_of(options.run, options.storage)))


if __name__ == "__main__":
    main()
