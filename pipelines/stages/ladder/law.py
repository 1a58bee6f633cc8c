"""L(C) = E + A C^-alpha, fitted to a few trainings, with intervals of its parameters and of predictions.

The fit is that of J. Hoffmann et al. (arXiv:2203.15556, D.2): Huber's loss of log L, delta 1e-3, from many starts. E is
searched on a grid, and A and alpha are fitted for each E, so nothing can end in a local minimum of E.

Intervals are by profile likelihood: values of E stay as long as the fit with them is no worse than the best one by what
Student's t allows; a prediction covers all of these. With 4 to 8 points and 3 parameters a bootstrap of residuals would
be far too narrow, because the residuals of such a fit are nearly 0 by themselves. s^2 is the sum of squared residuals
over the degrees of freedom, points minus 3. Tests measure how often intervals contain the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.stages.uncertainty import Estimate, student

FEWEST_POINTS = 4  # three parameters, and one degree of freedom for the intervals
FEWEST_SPREAD = 4.0  # the largest compute over the smallest
_HUBER_DELTA = 1e-3
_NUM_FLOORS = 400
_ITERATIONS = 60
_REFINEMENTS = 6  # of the grid of floors, until the interval of E has so many of them:
_FEWEST_KEPT = 20
_LEAST_ALPHA, _MOST_ALPHA = 1e-3, 3.0
_SMALLEST_NOISE = 1e-12  # of log L: an exact law has some rounding


class NoFitError(ValueError):
    """The points do not determine a law; the message says why, for a reader of the report."""


class Point(NamedTuple):
    """One training: FLOPs, and its loss in nats per token."""

    flops: float
    loss: float


@dataclass(frozen=True)
class Law:
    """A fitted law. Arrays have an entry for each floor E that the points allow."""

    floor: Estimate
    """E."""
    alpha: Estimate
    log_scale: float
    """log(A / C0^alpha) of the best fit: the loss above E at C0."""
    center: float
    """log C0: the middle of the points."""
    noise: float
    """s: relative deviation of a point from the law."""
    degrees: int
    _floor_e: np.ndarray
    _log_scale_e: np.ndarray
    _alpha_e: np.ndarray
    _covariance_ekk: np.ndarray  # of (log scale, alpha), in units of s^2
    _room_e: np.ndarray  # t^2 left for the two at this floor

    def predict(self, flops: float, of_a_training: bool = True) -> Estimate:
        """The loss at so many FLOPs with its 95 % interval: of one training there, or of the law itself."""
        x = np.log(flops) - self.center
        value = self.floor.value + np.exp(self.log_scale - self.alpha.value * x)
        above_e = np.exp(self._log_scale_e - self._alpha_e * x)
        loss_e = self._floor_e + above_e
        slope_ek = (above_e / loss_e)[:, None] * np.array([1.0, -x])
        variance_e = np.einsum("ek,ekl,el->e", slope_ek, self._covariance_ekk, slope_ek) + (1.0 if of_a_training else 0)
        half_e = self.noise * np.sqrt(variance_e * self._room_e)
        low, high = np.min(np.log(loss_e) - half_e), np.max(np.log(loss_e) + half_e)
        return Estimate(float(value), float(np.exp(low)), float(np.exp(high)))


def fit_law(points: Sequence[Point]) -> Law:
    """Fit at least FEWEST_POINTS points. Raises: NoFitError: they do not determine a law."""
    _check(points)
    log_flops_n = np.log([point.flops for point in points])
    log_loss_n = np.log([point.loss for point in points])
    center = float(log_flops_n.mean())
    x_n = log_flops_n - center
    floor_e = np.linspace(0.0, np.exp(log_loss_n.min()) * (1 - 1e-4), _NUM_FLOORS)
    degrees = len(points) - 3
    t_squared = student(degrees) ** 2
    for _ in range(_REFINEMENTS):
        log_scale_e, alpha_e, residual_en = _fit_above(x_n, log_loss_n, floor_e)
        usable_e = (alpha_e > _LEAST_ALPHA) & (alpha_e < _MOST_ALPHA) & np.isfinite(residual_en).all(axis=1)
        if not usable_e.any():
            raise NoFitError("no law of this form fits: the loss does not fall with compute as a power of it.")
        best = int(np.argmin(np.where(usable_e, _huber(residual_en).sum(axis=1), np.inf)))
        squares_e = (residual_en**2).sum(axis=1)
        noise = max(float(np.sqrt(squares_e[best] / degrees)), _SMALLEST_NOISE)
        room_e = t_squared - (squares_e - squares_e[best]) / noise**2
        kept_e = usable_e & (room_e > 0)
        kept_e[best] = True
        if kept_e.sum() >= _FEWEST_KEPT:
            break
        low, high = floor_e[max(0, best - 2)], floor_e[min(len(floor_e) - 1, best + 2)]
        floor_e = np.linspace(low, high, _NUM_FLOORS)
    room_e = np.clip(room_e[kept_e], 0, t_squared)
    covariance_ekk = _covariances(x_n, floor_e[kept_e], log_scale_e[kept_e], alpha_e[kept_e])
    half_e = noise * np.sqrt(covariance_ekk[:, 1, 1] * room_e)
    return Law(
        floor=Estimate(float(floor_e[best]), float(floor_e[kept_e].min()), float(floor_e[kept_e].max())),
        alpha=Estimate(
            float(alpha_e[best]), float((alpha_e[kept_e] - half_e).min()), float((alpha_e[kept_e] + half_e).max())
        ),
        log_scale=float(log_scale_e[best]),
        center=center,
        noise=noise,
        degrees=degrees,
        _floor_e=floor_e[kept_e],
        _log_scale_e=log_scale_e[kept_e],
        _alpha_e=alpha_e[kept_e],
        _covariance_ekk=covariance_ekk,
        _room_e=room_e,
    )


def _check(points: Sequence[Point]) -> None:
    if len(points) < FEWEST_POINTS:
        raise NoFitError(f"found {len(points)} sizes, expected {FEWEST_POINTS} or more: a law has three parameters.")
    if not all(np.isfinite([point.flops, point.loss]).all() and min(point) > 0 for point in points):
        raise NoFitError("a loss or the FLOPs of a size are not positive numbers.")
    flops = sorted(point.flops for point in points)
    if flops[-1] < FEWEST_SPREAD * flops[0]:
        raise NoFitError(
            f"the largest size has {flops[-1] / flops[0]:.2g} times the FLOPs of the smallest, expected "
            f"{FEWEST_SPREAD:g} times or more: so little spread says nothing of how the loss falls."
        )
    if len(set(flops)) < FEWEST_POINTS:
        raise NoFitError(f"found {len(set(flops))} different amounts of FLOPs, expected {FEWEST_POINTS} or more.")


def _fit_above(
    x_n: np.ndarray, log_loss_n: np.ndarray, floor_e: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each floor: log scale and alpha by Huber's loss of log L, and residuals (e, n); weighted Gauss-Newton."""
    above_en = np.exp(log_loss_n)[None] - floor_e[:, None]
    design_nk = np.stack([np.ones_like(x_n), -x_n], axis=1)
    theta_ek = np.linalg.lstsq(design_nk, np.log(above_en).T, rcond=None)[0].T
    for _ in range(_ITERATIONS):
        residual_en, jacobian_enk = _linearized(x_n, log_loss_n, floor_e, theta_ek)
        weight_en = np.minimum(1.0, _HUBER_DELTA / np.maximum(np.abs(residual_en), 1e-300))
        gram_ekk = np.einsum("enk,en,enl->ekl", jacobian_enk, weight_en, jacobian_enk)
        gram_ekk += 1e-12 * np.trace(gram_ekk, axis1=1, axis2=2)[:, None, None] * np.eye(2)
        right_ek = np.einsum("enk,en,en->ek", jacobian_enk, weight_en, residual_en)
        step_ek = np.linalg.solve(gram_ekk, right_ek[..., None])[..., 0]
        theta_ek = theta_ek + np.clip(step_ek, -0.5, 0.5)
    residual_en, _ = _linearized(x_n, log_loss_n, floor_e, theta_ek)
    return theta_ek[:, 0], theta_ek[:, 1], residual_en


def _linearized(
    x_n: np.ndarray, log_loss_n: np.ndarray, floor_e: np.ndarray, theta_ek: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of log L, and how the law's log L changes with log scale and alpha."""
    above_en = np.exp(np.clip(theta_ek[:, :1] - theta_ek[:, 1:] * x_n, -700, 700))
    loss_en = floor_e[:, None] + above_en
    share_en = above_en / loss_en
    return log_loss_n - np.log(loss_en), np.stack([share_en, -share_en * x_n], axis=2)


def _covariances(x_n: np.ndarray, floor_e: np.ndarray, log_scale_e: np.ndarray, alpha_e: np.ndarray) -> np.ndarray:
    theta_ek = np.stack([log_scale_e, alpha_e], axis=1)
    _, jacobian_enk = _linearized(x_n, np.zeros_like(x_n), floor_e, theta_ek)
    return np.linalg.pinv(np.einsum("enk,enl->ekl", jacobian_enk, jacobian_enk))


def _huber(residual: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= _HUBER_DELTA, 0.5 * size**2, _HUBER_DELTA * (size - 0.5 * _HUBER_DELTA))
