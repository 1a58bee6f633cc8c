"""An evaluated model on the page of a report: its figures beside its training, curves and generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.stages.sections import BarPlot, Line, LinePlot, Passage, Plot, Points, Section
from pipelines.stages.train.section import training_plots

if TYPE_CHECKING:
    from pipelines.stages.evaluate.stage import EvaluateOutput
    from pipelines.stages.train.stage import TrainOutput

_VALIDATION = (
    "Loss, perplexity and bits per byte are on the validation split: documents chosen by a hash of their text, none of "
    "which is in the training split. Bits per byte compares models with different tokenizers."
)
_BASELINES = (
    "gzip -9 and the untrained model (the same architecture before its first step) are scored on the same text."
)


@dataclass(frozen=True)
class EvaluatedModel:
    """Results of one model. `data`: lines about the data that it was evaluated on."""

    name: str
    pattern: str
    training: TrainOutput
    evaluation: EvaluateOutput
    history: Mapping[str, Points]
    data: Sequence[str] = ()

    def section(self) -> Section:
        """Row of the table, notes, plots and samples."""
        cells = {"layers": self.pattern, **self.training.size_cells(), **self.evaluation.report_cells()}
        return Section(
            subject=self.name,
            cells=cells | self.training.speed_cells(),
            notes=[_VALIDATION] if self.evaluation.gzip_bits_per_byte is None else [_VALIDATION, _BASELINES],
            data=self.data,
            plots=[*self._compression(), *training_plots(self.history), *self._by_position()],
            passages=[Passage(sample.prompt, sample.text) for sample in self.evaluation.samples],
        )

    def _compression(self) -> list[Plot]:
        def known(name: str, value: float | None) -> dict[str, float]:
            return {} if value is None else {name: value}

        if self.evaluation.bits_per_byte is None:
            return []
        return [
            BarPlot(
                file="bits_per_byte.png",
                heading="Compression",
                alt="Bars of bits per byte",
                title="Bits per byte on the validation documents (lower is better)",
                x_label="bits per byte",
                value=self.evaluation.bits_per_byte,
                references=known("gzip -9", self.evaluation.gzip_bits_per_byte),
                own_references=known("untrained", self.evaluation.untrained_bits_per_byte),
            )
        ]

    def _by_position(self) -> list[Plot]:
        curve = self.evaluation.position_perplexity
        if not curve:
            return []
        return [
            LinePlot(
                file="perplexity_by_position.png",
                heading="Length generalisation",
                alt="Perplexity against the position in the context",
                title="Perplexity by position in the context",
                x_label="position (tokens)",
                y_label="perplexity",
                lines=(Line(curve, style={"marker": ".", "markersize": 4}),),
                mark=(self.evaluation.seq_len, "training length"),
                note=f"Mean over {self.evaluation.num_windows} stretches of long validation documents, each started "
                "with an empty memory.",
            )
        ]
