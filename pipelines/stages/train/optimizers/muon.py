"""Muon for the matrices inside the blocks, AdamW for everything else (docs/design/0050).

Muon (arXiv:2502.16982, equations 1-4): a momentum of the gradients, made nearly orthogonal by Newton-Schulz iterations:

    M <- mu M + (1 - mu) G,    O = NS(mu M + (1 - mu) G),    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

The last factor gives O the root mean square of an AdamW update, so that both share lr and decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipelines.stages.train.optimizers.exchange import Exchange, Extent

if TYPE_CHECKING:
    from pipelines.stages.train.backends.zero import Place
    from pipelines.stages.train.optimizers.config import MuonConfig

MOMENTUM = "momentum"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- a X + (b A + c A^2) X with A = X X^T: steepest at zero
_TINY = 1e-7  # added to a norm


def orthogonalized(matrix: torch.Tensor, num_iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """Bring all singular values of a matrix near 1 (between about 0.7 and 1.2), by Newton-Schulz iterations.

    Args: dtype: of the products.
    Returns: a matrix of the dtype of `matrix`.
    """
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + _TINY)).to(dtype)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Updates groups with `uses_muon` by Muon and the others by torch's AdamW, however ZeRO shards them.

    `attach` comes between its start and its first step: under ZeRO, a group's parameters are flat tensors of many.
    Attributes:
        found_inf: 1 on the device: leave the next step out, without waiting for it. As torch's fused AdamW reads it.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: MuonConfig,
        betas: tuple[float, float],
        eps: float,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """compute_dtype: of the products of the iterations."""
        super().__init__(groups, {"lr": 0.0, "uses_muon": False})
        self._momentum = config.momentum
        self._orthogonalized = partial(orthogonalized, num_iterations=config.num_iterations, dtype=compute_dtype)
        others = [group for group in self.param_groups if not group["uses_muon"]]
        self._adamw = torch.optim.AdamW(others, lr=0.0, betas=betas, eps=eps, fused=True)
        self._adamw.state = self.state
        self._of_updated: list[tuple[torch.Tensor, list[str]]] = []

    def attach(
        self, shapes: Mapping[str, torch.Size], held: Mapping[str, Place], updated: Sequence[torch.Tensor]
    ) -> None:
        """Learn where the matrices are. A collective.

        Args:
            shapes: of the parameters that Muon updates, by name.
            held: what this rank has of each.
            updated: the tensors that `step` will find in the groups; as many in the same order on every rank.
        """
        self._shapes = shapes
        self._held = {name: place for name, place in held.items() if name in shapes}
        self._exchange = Exchange(
            shapes, {name: Extent(place.start, place.numel) for name, place in self._held.items()}
        )
        number_of = {id(tensor): number for number, tensor in enumerate(updated)}
        mine = {name: number_of[id(place.updated)] for name, place in self._held.items()}
        everyones: list[dict[str, int]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyones, mine)
        where = {name: number for of_rank in everyones for name, number in of_rank.items()}
        self._of_updated = [
            (tensor, [n for n in shapes if where[n] == number]) for number, tensor in enumerate(updated)
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # of its overloads, one is used
        """Update the tensors that the groups hold now. A collective if matrices are split over ranks."""
        assert closure is None
        for group in self.param_groups:
            if group["uses_muon"]:
                for tensor in group["params"]:
                    self._update(tensor, group)
        self._adamw.param_groups = [group for group in self.param_groups if not group["uses_muon"]]
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]  # as GradScaler sets it
        if any(group["params"] for group in self._adamw.param_groups):
            self._adamw.step()

    def _update(self, tensor: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        state = self.state[tensor]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(tensor)
        momentum = torch.lerp(gradient, state[MOMENTUM], self._momentum)
        direction = torch.lerp(gradient, momentum, self._momentum).view(-1)
        names = next(names for updated, names in self._of_updated if updated is tensor)
        held = {name: self._held[name] for name in names if name in self._held}
        pieces = {name: direction.narrow(0, place.offset, place.numel) for name, place in held.items()}
        steps = self._exchange.apply(self._orthogonalized, pieces, names)
        new = tensor * (1 - group["lr"] * group["weight_decay"])
        for name, place in held.items():
            alike = 0.2 * math.sqrt(max(self._shapes[name]))
            place.of(new).sub_(steps[name], alpha=group["lr"] * alike)
        if self.found_inf is not None:
            leave_out = self.found_inf > 0
            new, momentum = torch.where(leave_out, tensor, new), torch.where(leave_out, state[MOMENTUM], momentum)
        tensor.copy_(new)
        state[MOMENTUM].copy_(momentum)
