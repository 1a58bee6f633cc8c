"""Curves with less in them: smoothed, of fewer points, the mean of several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_POINTS = 300  # per line: more cannot be told apart
_SMOOTHED_FROM = 20  # points
_SMOOTHED_SHARE = 0.04  # of the points, on either side

XY = tuple[np.ndarray, np.ndarray]


def mean_of(singles: Sequence[XY]) -> XY:
    """The mean where all curves are, at the points of the first. Args: singles: each of at least one point.

    Over time, short curves may not meet: one seed was validated after 80 seconds, another after 90. Then first points
    are averaged with first points, in x too, and so on.
    """
    x = singles[0][0]
    inside = (x >= max(one[0].min() for one in singles)) & (x <= min(one[0].max() for one in singles))
    if not inside.any():
        count = min(len(one[0]) for one in singles)
        x, y = np.mean([[one[0][:count], one[1][:count]] for one in singles], axis=0)
        return x, y
    x = x[inside]
    return x, np.mean([np.interp(x, *one) for one in singles], axis=0)


def smoothed(y: np.ndarray) -> np.ndarray:
    """A centred mean over some of the points, at the beginning, where curves are steep, over fewer; of short curves the
    curve itself."""
    if len(y) < _SMOOTHED_FROM:
        return y
    reach = max(2, round(_SMOOTHED_SHARE * len(y)))
    index = np.arange(len(y))
    behind = np.minimum(reach, index)
    ahead = np.minimum(np.minimum(reach, index), len(y) - 1 - index)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((sums[index + ahead + 1] - sums[index - behind]) / (behind + ahead + 1))


def thinned(x: np.ndarray, y: np.ndarray) -> XY:
    """Every n-th point and the last."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
    return x[kept], y[kept]


def thinned_range(x: np.ndarray, y: np.ndarray) -> XY:
    """The lowest and the highest point of each stretch, so that no outlier is lost."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept: list[int] = []
    for piece in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        kept += sorted({int(piece[np.argmin(y[piece])]), int(piece[np.argmax(y[piece])])})
    return x[kept], y[kept]
