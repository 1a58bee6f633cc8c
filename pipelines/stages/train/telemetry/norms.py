"""Norms of weights, gradients and updates by group of parameters: local sums over pieces and one small all-reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.trainer import PARAM, BeforeUpdate, Trainer


def group_of(name: str, mixers: Sequence[str]) -> str:
    """The group of a parameter: embedding, head, norms (of the residual stream), mlp, or its layer's kind of mixer."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return "norms" if parts[0] == "norm" else parts[0]
    number, part = int(parts[1]), parts[2]
    if part.endswith("_norm"):
        return "norms"
    return mixers[number] if part == "mixer" else part


class GroupNorms:
    """Watches single updates. While it does, this rank's share of the weights is in memory twice.

    That is between the backward, which has freed the activations, and the end of the step.
    """

    def __init__(self, trainer: Trainer, every_steps: int | None) -> None:
        self._trainer, self._every_steps = trainer, every_steps
        names = [key.removeprefix(f"{PARAM}/") for key in trainer.shapes if key.startswith(f"{PARAM}/")]
        self._groups = {name: group_of(name, trainer.model.config.mixers) for name in names}
        self._numbers = {group: number for number, group in enumerate(dict.fromkeys(self._groups.values()))}
        self._before: dict[str, torch.Tensor] | None = None  # the weights; None: not watched
        self._gradients = self._zeros()

    def watch(self, step: int, is_logged: bool) -> BeforeUpdate | None:
        """What is to be called before the update of a step; None if the step's norms are not due."""
        self._before = None
        if self._every_steps is None or not is_logged or step % self._every_steps:
            return None
        self._before, self._gradients = {}, self._zeros()
        return self._note

    def points(self, grad_norm: float | None) -> dict[str, float]:
        """The curves of the step that was watched, if one was and was applied. A collective; waits for the device.

        Weights are those before the update. Gradients are scaled so that all groups together have `grad_norm`, which is
        that before clipping.
        """
        if self._before is None:
            return {}
        sums = torch.stack((self._zeros(), self._gradients, self._zeros()))
        pieces = self._trainer.pieces()
        for name, before in self._before.items():
            number = self._numbers[self._groups[name]]
            sums[0, number] += self._square(before)
            sums[2, number] += self._square(pieces[f"{PARAM}/{name}"].values - before)
        self._before = None
        dist.all_reduce(sums)
        if grad_norm is None:
            return {}
        weights, gradients, updates = sums.sqrt().tolist()
        clipped = math.sqrt(math.fsum(norm**2 for norm in gradients))
        points = {}
        for group, number in self._numbers.items():
            points[f"train/norm/weight/{group}"] = weights[number]
            if clipped:
                points[f"train/norm/gradient/{group}"] = gradients[number] * grad_norm / clipped
            if weights[number]:
                points[f"train/norm/update/{group}"] = updates[number] / weights[number]
        return points

    def _note(self, gradients: Mapping[str, Piece]) -> None:
        """Take in gradients, and the weights as they are."""
        assert self._before is not None
        pieces = self._trainer.pieces()
        for name, gradient in gradients.items():
            self._gradients[self._numbers[self._groups[name]]] += self._square(gradient.values)
            self._before[name] = pieces[f"{PARAM}/{name}"].values.clone()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self._numbers), dtype=torch.float64, device=self._trainer.exact_device)

    def _square(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of squares, as a float64 scalar on the exact device."""
        return torch.linalg.vector_norm(values).to(self._trainer.exact_device).double().square()
