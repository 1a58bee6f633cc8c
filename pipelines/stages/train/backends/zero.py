"""Where DeepSpeed's ZeRO keeps parameters and optimizer state on this rank, by stage.

The optimizer updates float32 tensors, one per parameter or flat ones of many; its state has their layout. A place says
where a part of a parameter lies in one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from pipelines.stages.train.pieces import even_shares


class Place(NamedTuple):
    """A part of a parameter and where it is kept."""

    start: int  # in the flattened parameter
    numel: int
    updated: torch.Tensor  # what the optimizer updates: the key of its state
    offset: int  # in `updated`, flattened

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part in a tensor that has the layout of `updated`: 1-D, of the same memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class Layout(Protocol):
    """How one ZeRO stage lays things out."""

    updated: list[torch.Tensor]
    """The tensors that the optimizer updates on this rank."""

    held: dict[str, Place]
    """By parameter: what this rank holds of its float32 values and state; none for those it holds nothing of."""

    own: dict[str, Place]
    """Of that, what it answers for: over all ranks each element once."""

    def begin_load(self) -> None:
        """Have parameters rest where they are kept, before their values change. A collective."""

    def end_load(self) -> None:
        """Have the model compute with the values that are now kept. A collective."""


def layout_of(stage: int, engine: Any, params: Mapping[str, nn.Parameter]) -> Layout:
    """The layout that a DeepSpeed engine uses."""
    if stage == 0:
        return _Replicated(params)
    return (
        _PartitionedParameters(engine.optimizer, params) if stage == 3 else _PartitionedState(engine.optimizer, params)
    )


class _Replicated:
    """Stage 0: every rank has everything."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.updated: list[torch.Tensor] = list(params.values())
        self.held = {name: Place(0, param.numel(), param, 0) for name, param in params.items()}
        sizes = {name: param.numel() for name, param in params.items()}
        shares = even_shares(sizes, dist.get_rank(), dist.get_world_size())
        self.own = {name: Place(share.start, share.numel, params[name], share.start) for name, share in shares.items()}

    def begin_load(self) -> None:
        pass

    def end_load(self) -> None:
        pass


class _PartitionedState:
    """Stages 1 and 2: whole parameters, and a float32 copy of the rank's partition of all of them in a row."""

    def __init__(self, optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self.updated: list[torch.Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.held = self.own = {
            name: self._place(fragment) for name, param in params.items() if (fragment := _fragment_of(param))
        }

    def _place(self, fragment: Any) -> Place:
        in_param, in_partition = fragment.lp_fragment_address, fragment.hp_fragment_address
        updated = self.updated[fragment.param_group_index]
        return Place(in_param.start, in_param.numel, updated, in_partition.start)

    def begin_load(self) -> None:
        pass

    def end_load(self) -> None:
        self._optimizer.update_lp_params()


def _fragment_of(param: nn.Parameter) -> Any:
    return param._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's, on every parameter of its optimizer


class _PartitionedParameters:
    """Stage 3: a partition of each parameter, all of one length, the last ones padded."""

    def __init__(self, optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self.updated: list[torch.Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        places = {name: self._place(param) for name, param in params.items()}
        self.held = self.own = {name: place for name, place in places.items() if place.numel > 0}

    def _place(self, param: Any) -> Place:
        group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(param)]
        start = dist.get_rank() * padded
        return Place(start, min(padded, param.ds_numel - start), self.updated[group], offset)

    def begin_load(self) -> None:
        self._optimizer._partition_all_parameters()

    def end_load(self) -> None:
        """As DeepSpeed ends a step: partitions where the model takes them from, then small parameters whole."""
        for group in range(len(self.updated)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
