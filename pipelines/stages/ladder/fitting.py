"""From points to the output of a ladder: the law, its predictions, and its check against the largest size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.stages.ladder.law import FEWEST_POINTS, Law, NoFitError, Point, fit_law
from pipelines.stages.ladder.stage import CurvePoint, Interval, LadderOutput, LadderPoint, Prediction
from pipelines.stages.uncertainty import Estimate

_CURVE_POINTS = 60
_BEYOND = 1.3  # times the compute that is drawn


def fitted_output(
    points: Sequence[LadderPoint], measured_by: str, targets: Sequence[tuple[str, float]]
) -> LadderOutput:
    """Fit and predict. Args: targets: names and FLOPs."""
    ordered = sorted(points, key=lambda one: one.flops)
    try:
        law = fit_law([Point(one.flops, one.loss) for one in ordered])
    except NoFitError as error:
        return LadderOutput(points=tuple(ordered), measured_by=measured_by, problem=str(error))
    reach = max([ordered[-1].flops, *(flops for _, flops in targets)])
    grid = np.geomspace(ordered[0].flops / _BEYOND, reach * _BEYOND, _CURVE_POINTS)
    return LadderOutput(
        points=tuple(ordered),
        measured_by=measured_by,
        problem=None,
        floor=_interval(law.floor),
        exponent=_interval(law.alpha),
        noise=law.noise,
        predictions=tuple(_prediction(law, name, flops) for name, flops in targets),
        check=_check_of(ordered),
        curve=tuple(
            CurvePoint(flops=flops, loss=_interval(law.predict(flops, of_a_training=False))) for flops in grid.tolist()
        ),
    )


def _prediction(law: Law, name: str, flops: float, measured: float | None = None) -> Prediction:
    return Prediction(name=name, flops=flops, loss=_interval(law.predict(flops)), measured=measured)


def _check_of(ordered: Sequence[LadderPoint]) -> Prediction | None:
    """The largest size as the others predict it; None if they determine no law."""
    *smaller, largest = ordered
    if len(smaller) < FEWEST_POINTS:
        return None
    try:
        law = fit_law([Point(one.flops, one.loss) for one in smaller])
    except NoFitError:
        return None
    return _prediction(law, largest.name, largest.flops, largest.loss)


def _interval(estimate: Estimate) -> Interval:
    assert estimate.low is not None
    assert estimate.high is not None
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)
