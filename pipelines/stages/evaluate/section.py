"""An evaluated model on the page of a report: its figures beside its training, curves and generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.stages.evaluate.results import Curve, MeasureResult
from pipelines.stages.numbers import with_interval
from pipelines.stages.sections import BarPlot, Line, LinePlot, Passage, Plot, Points, Section
from pipelines.stages.train.section import training_plots

if TYPE_CHECKING:
    from pipelines.stages.evaluate.stage import EvaluateOutput
    from pipelines.stages.train.stage import TrainOutput


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
        results = self.evaluation.results
        cells = {"layers": self.pattern, **self.training.size_cells()}
        for result in results:
            cells |= _cells(result)
        if self.evaluation.precision != "fp32":
            cells["precision"] = self.evaluation.precision
        return Section(
            subject=self.name,
            cells=cells | self.training.speed_cells(),
            notes=[note for result in results for note in result.notes],
            data=self.data,
            plots=[
                *(plot for result in results for plot in _bars(result)),
                *training_plots(self.history),
                *(_plot(curve) for result in results for curve in result.curves),
            ],
            passages=[Passage(sample.prompt, sample.text) for result in results for sample in result.samples],
        )


def _cells(result: MeasureResult) -> dict[str, str]:
    cells = {
        figure.name.replace("_", " "): with_interval(figure.value, figure.low, figure.high)
        for figure in result.figures
        if figure.is_main
    }
    return cells | {reference.name: f"{reference.value:.3f}" for reference in result.references}


def _bars(result: MeasureResult) -> list[Plot]:
    figure = next((figure for figure in result.figures if figure.unit == "bits per byte"), None)
    if figure is None:
        return []
    return [
        BarPlot(
            file="bits_per_byte.png",
            heading="Compression",
            alt="Bars of bits per byte",
            title="Bits per byte on the validation documents (lower is better)",
            x_label="bits per byte",
            value=figure.value,
            own_references={reference.name: reference.value for reference in result.references},
        )
    ]


def _plot(curve: Curve) -> Plot:
    return LinePlot(
        file=f"{curve.name}.png",
        heading=curve.title,
        alt=curve.title,
        title=curve.title,
        x_label=curve.x_label,
        y_label=curve.y_label,
        lines=(Line([(point.x, point.y) for point in curve.points], curve.part, {"marker": ".", "markersize": 4}),),
        mark=(curve.mark.x, curve.mark.label) if curve.mark else None,
        note=curve.note,
    )
