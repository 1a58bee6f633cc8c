"""A law of compute on logarithmic axes: trainings as dots, the law with its band, predictions with their intervals."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pipelines.stages.report.drawing import COLOURS, INK, MUTED, SMALL, Picture, new_figure, save, short
from pipelines.stages.sections import FittedLaw, LawPoint

_HEIGHT = 3.2  # inches
_LABELLED = 12  # points with their names: more make a crowd


def draw_law(law: FittedLaw) -> Picture:
    """One picture; without a law the points alone."""
    with new_figure(_HEIGHT) as (figure, axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        if law.curve:
            flops = [one.flops for one in law.curve]
            axes.fill_between(
                flops, [one.low or one.loss for one in law.curve], [one.high or one.loss for one in law.curve],
                color=COLOURS[0], alpha=0.15, linewidth=0,
            )  # fmt: skip
            axes.plot(flops, [one.loss for one in law.curve], color=COLOURS[0], linewidth=1.4)
        axes.plot([one.flops for one in law.points], [one.loss for one in law.points], "o", color=INK, markersize=4)
        for one in law.predicted:
            axes.errorbar(
                one.flops, one.loss, yerr=[[one.loss - (one.low or one.loss)], [(one.high or one.loss) - one.loss]],
                fmt="D", color=COLOURS[1], markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
        _label(axes, [*law.points, *law.predicted])
        _frame(axes, law)
        axes.set_xlabel("FLOPs of training", fontsize=SMALL)
        axes.set_ylabel("loss, nats per token", fontsize=SMALL)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        note = "Dots: trainings. Line: the law, with its 95 % band." if law.curve else "There is no law."
        if law.predicted:
            note += " Diamonds: predictions, with 95 % intervals of one training."
        alt = (
            f"Loss against compute: {', '.join(f'{one.name} {one.loss:.4g}' for one in (*law.points, *law.predicted))}"
        )
        return save(figure, f"ladder-{law.name}", f"Loss against compute: {law.name}", alt, note)


def _label(axes: Axes, points: list[LawPoint]) -> None:
    if len(points) > _LABELLED:
        return
    for one in points:
        axes.annotate(
            short(one.name), (one.flops, one.loss), textcoords="offset points", xytext=(4, 4), fontsize=SMALL - 1,
            color=MUTED,
        )  # fmt: skip


def _frame(axes: Axes, law: FittedLaw) -> None:
    """Keep the points readable: a band that is far wider than they spread is cut off."""
    losses = [one.loss for one in (*law.points, *law.predicted, *law.curve)]
    ends = [end for one in law.predicted for end in (one.low, one.high) if end is not None]
    low, high = min(losses), max(losses)
    margin = (high / low) ** 0.5
    axes.set_ylim(max(min([low, *ends]), low / margin) * 0.98, min(max([high, *ends]), high * margin) * 1.02)
    axes.margins(x=0.08)
