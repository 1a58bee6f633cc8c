"""A training run on the page of a report: its curves, in the section of the stage that judges its model."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.stages.sections import Line, LinePlot, Points


def training_plots(history: Mapping[str, Points]) -> list[LinePlot]:
    """Loss and learning rate against the step, as far as the history has them."""
    plots = []
    if loss := history.get("train/loss"):
        valid_style = {"marker": "o", "markersize": 4, "linewidth": 1.5}
        plots.append(
            LinePlot(
                file="loss.png",
                heading="Training",
                alt="Loss against the step",
                title="Loss",
                x_label="step",
                y_label="nats per token",
                lines=(
                    Line(loss, "training", {"linewidth": 1, "alpha": 0.7}),
                    Line(history.get("valid/loss", ()), "validation", valid_style),
                ),
            )
        )
    by_source = [
        Line(points, metric.removeprefix("valid/loss/"), {"marker": "o", "markersize": 4, "linewidth": 1.5})
        for metric, points in sorted(history.items())
        if metric.startswith("valid/loss/")
    ]
    if by_source:
        plots.append(
            LinePlot(
                file="loss-by-source.png",
                heading="Sources",
                alt="Validation loss of each source against the step",
                title="Validation loss by source",
                x_label="step",
                y_label="nats per token",
                lines=tuple(by_source),
            )
        )
    if lr := history.get("train/lr"):
        plots.append(
            LinePlot(
                file="lr.png",
                heading="Schedule",
                alt="Learning rate against the step",
                title="Learning rate",
                x_label="step",
                y_label="learning rate",
                lines=(Line(lr),),
                height=2.2,
            )
        )
    return plots
