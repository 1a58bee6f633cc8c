"""A training on the page of a report: its facts, its recipe, and all curves that were recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines.engine.fingerprint import config_that_matters, flatten
from pipelines.stages.sections import Points, Section, Series, Training

if TYPE_CHECKING:
    from pipelines.engine.stage import StageNode
    from pipelines.stages.train.stage import TrainOutput, TrainStage

_BY_SOURCE = {"train/loss/": "Training loss by source", "valid/loss/": "Validation loss by source"}
_FAMILIES = {
    "train/time/": ("time-by-part", "Time of a step by part", "s per step"),
    "train/norm/weight/": ("norm-weight", "Norms of weights by group", ""),
    "train/norm/gradient/": ("norm-gradient", "Norms of gradients by group", "before clipping"),
    "train/norm/update/": ("norm-update", "Update by group", "share of the weights' norm"),
}
"""Curves that share a plot, by the beginning of their names: the plot, its title, its axis."""
_CLOCKS = ("train/tokens", "train/hours", "train/max_steps", "train/resumed_from_step")  # what others are drawn against
_NATS = "nats per token"


def training_section(node: StageNode[TrainStage], history: Mapping[str, Points]) -> Section:
    """The share of a finished training."""
    return Section(
        subject=node.name,
        facts={"layers": node.config.model.pattern, **_facts(node.output), "seed": str(node.config.seed)},
        training=Training(
            series=list(series_of(history)),
            tokens=[(0, 0), *history.get("train/tokens", ())],
            seconds=seconds_by_step(history),
            recipe=_recipe(node),
            seed=node.config.seed,
        ),
    )


def series_of(history: Mapping[str, Points]) -> Iterator[Series]:
    """All metrics of a training, those that are known first."""
    loss, valid = history.get("train/loss", ()), history.get("valid/loss", ())
    if loss:
        yield Series(
            plot="loss", title="Loss", part="training", y_label=_NATS, points=loss, is_noisy=True, is_loss=True
        )
    if valid:
        yield Series(plot="loss", title="Loss", part="validation", y_label=_NATS, points=valid, is_loss=True)
    for prefix, title in _BY_SOURCE.items():
        for name in sorted(history):
            if name.startswith(prefix):
                plot = prefix.strip("/").replace("/", "-") + "-by-source"
                part = name.removeprefix(prefix)
                yield Series(plot=plot, title=title, part=part, y_label=_NATS, points=history[name], is_loss=True)
    known = {
        "train/grad_norm": Series(
            plot="grad-norm", title="Gradient norm", y_label="before clipping", points=(), is_noisy=True
        ),
        "train/lr": Series(plot="lr", title="Learning rate", y_label="", points=()),
        "train/tokens_per_s": Series(
            plot="tokens-per-s", title="Speed", y_label="tokens/s, all workers", points=(), is_noisy=True
        ),
        "train/mfu": Series(
            plot="mfu", title="Model FLOP/s utilisation (MFU)", y_label="share of the peak", points=(), is_noisy=True,
            note="The table of models has the peak.",
        ),
    }  # fmt: skip
    for name, series in known.items():
        if name in history:
            yield Series(**{**vars(series), "points": history[name]})
    for prefix, (plot, title, y_label) in _FAMILIES.items():
        for name in sorted(history):
            if name.startswith(prefix):
                part = name.removeprefix(prefix)
                yield Series(plot=plot, title=title, part=part, y_label=y_label, points=history[name], is_noisy=True)
    drawn = {"train/loss", "valid/loss", *known, *_CLOCKS}
    if len({value for _, value in history.get("train/num_workers", ())}) < 2:
        drawn.add("train/num_workers")  # it never changed
    for name in sorted(history):
        if name not in drawn and not name.startswith((*_BY_SOURCE, *_FAMILIES)):
            plot = name.removeprefix("train/").replace("/", "-")
            yield Series(plot=plot, title=name, y_label="", points=history[name], is_noisy=True)


def seconds_by_step(history: Mapping[str, Points]) -> Points:
    """Seconds spent in optimizer steps so far, from the tokens and the speed between points; without validation,
    checkpoints and the time between attempts."""
    if "train/hours" in history:
        return [(0, 0.0), *((step, 3600 * hours) for step, hours in history["train/hours"])]
    speed = dict(history.get("train/tokens_per_s", ()))
    seconds, before = 0.0, 0.0
    points: list[tuple[float, float]] = [(0, 0.0)]
    for step, tokens in history.get("train/tokens", ()):
        if speed.get(step):
            seconds += (tokens - before) / speed[step]
            before = tokens
            points.append((step, seconds))
    return points


def _facts(output: TrainOutput) -> dict[str, str]:
    return {
        "parameters": f"{output.num_params / 1e6:,.2f} M",
        "steps": f"{output.steps:,}",
        "tokens seen": f"{output.tokens_seen / 1e6:,.2f} M",
        "time in steps": str(timedelta(seconds=round(output.train_time_s))),
        "tokens/s": f"{output.tokens_per_s:,.0f}",
        "MFU": "-" if output.mfu is None else f"{output.mfu:.1%}",
        **({"peak of MFU": f"{output.peak_flops / 1e12:.4g} TFLOP/s"} if output.peak_flops is not None else {}),
        **_measured_peak(output),
        **({"trained on": output.devices} if output.devices else {}),
    }


def _measured_peak(output: TrainOutput) -> dict[str, str]:
    """The second peak, where there are two."""
    measured, mfu = output.measured_peak_flops, output.mfu_of_measured
    if measured is None or mfu is None or measured == output.peak_flops:
        return {}
    return {"MFU of the measured peak": f"{mfu:.1%} of {measured / 1e12:.4g} TFLOP/s"}


def _recipe(node: StageNode[TrainStage]) -> dict[str, Any]:
    recipe = flatten(config_that_matters(node.config))
    reads = {"tokens": node.inputs.tokens, "initial": (node.inputs.initial,) if node.inputs.initial else ()}
    digests = {role: [read.fingerprint[:8] for read in nodes] for role, nodes in reads.items() if nodes}
    return {name: value for name, value in recipe.items() if name not in ("kind", "seed")} | digests
