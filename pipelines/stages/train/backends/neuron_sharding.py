"""Where a Neuron training keeps parameters, gradients and optimizer state on this rank, and how ranks exchange them.

The optimizer updates float32 tensors of one dimension, each a stretch of one parameter in the parameter's own memory:
there are no flat copies. Collectives are synchronous, of one parameter at a time, and of bounded size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from bmojo import BMojoLM
from pipelines.neuron import runtime
from pipelines.stages.train.backends.zero import Layout, Place

MOST_AT_ONCE = 1 << 27  # elements of one collective, 512 MB: larger ones failed on the beta


class Sharding(Layout, Protocol):
    """A layout whose gradients are weighted after the backward, because a loss must not be scaled before it."""

    shapes: dict[str, torch.Size]
    """Of the whole parameters."""

    def begin_backward(self, weight: int) -> None:
        """The gradients of the next backward count so many times: those of a mean over `weight` targets."""

    def end_backward(self) -> None:
        """Add them up. Collectives as in every other step."""

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """Sums over all backwards since the last call and all ranks, of what this rank owns: 1-D. A collective."""

    def end_evaluation(self) -> None:
        """A forward without a backward is done."""


def sharding_of(parallel: str, model: BMojoLM, device: torch.device) -> Sharding:
    """Move a model to the device and shard it. A collective. One rank has nothing to shard."""
    if device.type == runtime.TYPE:
        runtime.move(model, device)
    if parallel == "fsdp2" and dist.get_world_size() > 1:
        return FullyShard(model, device)
    return Zero1(model)


class Zero1:
    """Every rank has all parameters and gradients, and updates an equal stretch of each parameter.

    S. Rajbhandari et al., ZeRO (arXiv:1910.02054), stage 1. Stretches instead of whole parameters, as torch's
    ZeroRedundancyOptimizer has them: the embedding would be one rank's, and a checkpoint's pieces are stretches anyway.
    """

    def __init__(self, model: BMojoLM) -> None:
        self._params = dict(model.named_parameters())
        self.shapes = {name: param.shape for name, param in self._params.items()}
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self.held = self.own = {
            name: place for name, param in self._params.items() if (place := self._place(param)).numel > 0
        }
        self.updated = [place.updated for place in self.held.values()]
        self._weight = 0
        self._sums: dict[str, torch.Tensor] = {}

    def _stretch(self, numel: int) -> int:
        """Elements of a parameter that a rank updates; of the last ranks fewer."""
        return -(-numel // self._num_ranks)

    def _place(self, param: torch.Tensor) -> Place:
        size = self._stretch(param.numel())
        start = min(self._rank * size, param.numel())
        numel = min(size, param.numel() - start)
        return Place(start, numel, param.detach().view(-1).narrow(0, start, numel), 0)

    def begin_backward(self, weight: int) -> None:
        """See Sharding."""
        self._weight = weight

    @torch.no_grad()
    def end_backward(self) -> None:
        """See Sharding."""
        found = {name: param.grad for name, param in self._params.items() if param.grad is not None}
        for param in self._params.values():
            param.grad = None
        if not self._sums:
            torch._foreach_mul_(list(found.values()), float(self._weight))
            self._sums = found
            return
        torch._foreach_add_([self._sums[name] for name in found], list(found.values()), alpha=float(self._weight))

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """See Sharding."""
        sums, self._sums = self._sums, {}
        for gradient in sums.values():
            self._add_up(gradient.view(-1))
        return {
            name: sums[name].view(-1).narrow(0, place.start, place.numel)
            for name, place in self.own.items()
            if name in sums
        }

    def _add_up(self, flat: torch.Tensor) -> None:
        if self._num_ranks > 1:
            for part in flat.split(MOST_AT_ONCE):
                dist.all_reduce(part)

    def end_evaluation(self) -> None:
        """Nothing is gathered."""

    def begin_load(self) -> None:
        """Parameters rest where they are."""

    @torch.no_grad()
    def end_load(self) -> None:
        """Give each rank's stretches to all."""
        if self._num_ranks == 1:
            return
        for name, param in self._params.items():
            size = self._stretch(param.numel())
            own = torch.zeros(size, device=param.device)
            if name in self.held:
                own.narrow(0, 0, self.held[name].numel).copy_(self.held[name].updated)
            self._gather_into(param.view(-1), own)

    def _gather_into(self, flat: torch.Tensor, own: torch.Tensor) -> None:
        """Put the equal stretches of all ranks one after the other, the last ones cut off at the end."""
        size, at_once = own.numel(), max(1, MOST_AT_ONCE // self._num_ranks)
        for first in range(0, size, at_once):
            part = own[first : first + at_once]
            gathered = torch.empty(self._num_ranks * part.numel(), device=own.device)
            dist.all_gather_single(gathered, part)
            for rank in range(self._num_ranks):
                start = rank * size + first
                numel = min(part.numel(), flat.numel() - start)
                if numel > 0:
                    flat.narrow(0, start, numel).copy_(gathered.narrow(0, rank * part.numel(), numel))


class FullyShard:
    """torch's fully_shard, by block: each rank has a stretch of rows of each parameter, its gradient and its state.

    Parameters are gathered and gradients reduced in float32: A_log and dt_bias would be rounded in bfloat16. Gradients
    are reduced after each micro batch, because adding up whole ones first takes the memory that sharding saves.
    """

    def __init__(self, model: BMojoLM, device: torch.device) -> None:
        self.shapes = {name: param.shape for name, param in model.named_parameters()}
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._reduce = _WeightedReduceScatter()
        self._units: list[FSDPModule] = [fully_shard(block, mesh=mesh) for block in model.blocks]
        self._units.append(fully_shard(model, mesh=mesh))
        for unit in self._units:
            unit.set_custom_reduce_scatter(self._reduce)
        self._params = {name: _sharded(param) for name, param in model.named_parameters()}
        places = {name: self._place(name, param) for name, param in self._params.items()}
        self.held = self.own = {name: place for name, place in places.items() if place.numel > 0}
        self.updated = [place.updated for place in self.held.values()]

    def _place(self, name: str, param: DTensor) -> Place:
        rows, *rest = self.shapes[name]
        first_row = min(dist.get_rank() * -(-rows // dist.get_world_size()), rows)
        local = param.to_local().detach().view(-1)
        return Place(first_row * torch.Size(rest).numel(), local.numel(), local, 0)

    def begin_backward(self, weight: int) -> None:
        """See Sharding."""
        self._reduce.weight = float(weight)

    def end_backward(self) -> None:
        """The backward reduced them and added them up."""

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """See Sharding."""
        found = {}
        for name, param in self._params.items():
            if param.grad is not None and name in self.own:
                found[name] = _sharded(param.grad).to_local().view(-1)
            param.grad = None
        return found

    def end_evaluation(self) -> None:
        """Let go of what the forward gathered: a backward would have."""
        for unit in self._units:
            unit.reshard()

    def begin_load(self) -> None:
        """Parameters rest where they are."""
        self.end_evaluation()

    def end_load(self) -> None:
        """The next forward gathers what is there."""


class _WeightedReduceScatter(DefaultReduceScatter):
    """Adds up the gradients of all ranks, each times its own weight: a rank knows only its own number of targets."""

    weight = 1.0

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> dist.Work | None:
        """As fully_shard calls it; `op` would be a mean."""
        input_tensor.mul_(self.weight)
        return super().__call__(output_tensor, input_tensor, group, dist.ReduceOp.SUM, async_op)


def _sharded(tensor: torch.Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor
