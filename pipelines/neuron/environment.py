"""What TorchNeuron must find in a worker's environment before it is imported: which core is whose, and its compiler.

Nothing here reads or writes an environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from base.errors import UserError

VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"
CACHE_DIR = "TORCH_NEURONX_NEFF_CACHE_DIR"
COMPILER_FLAGS = "NEURON_CC_FLAGS"

CoreAssignment = Literal["local_rank", "ray"]


@dataclass(frozen=True)
class Place:
    """Where one worker is. cores: the ids that Ray gave it; None: Ray gave none."""

    node_id: str
    local_rank: int
    cores: tuple[int, ...] | None


@dataclass(frozen=True)
class CompilerSettings:
    """Attributes:
    cache_dir: folder of compiled graphs; None: TorchNeuron's default.
    flags: added to those that are there.
    """

    cache_dir: str | None = None
    flags: str = ""


def prepare_env(
    places: Sequence[Place],
    rank: int,
    assignment: CoreAssignment,
    compiler: CompilerSettings,
    before: Mapping[str, str],
) -> dict[str, str | None]:
    """Variables to set for a worker, and to remove (None), before torch_neuronx is imported.

    Args: places: of all workers, by rank. before: the worker's environment.
    Raises: UserError: the cores cannot be assigned in this way.
    """
    values: dict[str, str | None] = {VISIBLE_CORES: _visible_cores(places, rank, assignment)}
    if compiler.cache_dir is not None:
        values[CACHE_DIR] = compiler.cache_dir
    if compiler.flags:
        values[COMPILER_FLAGS] = f"{before.get(COMPILER_FLAGS, '')} {compiler.flags}".strip()
    return values


def _visible_cores(places: Sequence[Place], rank: int, assignment: CoreAssignment) -> str | None:
    """The core of a worker; None: TorchNeuron takes that of LOCAL_RANK."""
    own = places[rank]
    here = [place for place in places if place.node_id == own.node_id]
    given = sorted(core for place in here for core in place.cores or ())
    shown = ", ".join(map(str, given)) or "none"
    if any(place.cores is not None and len(place.cores) != 1 for place in here):
        raise UserError(
            f"workers on node {own.node_id} were given the NeuronCores {shown}, expected one each. Set "
            "resources.neuron_cores_per_worker: 1."
        )
    if assignment == "local_rank":
        if given and given != list(range(len(here))):
            raise UserError(
                f"train.backend.core_assignment=local_rank needs whole machines: node {own.node_id} has {len(here)} "
                f"workers on the cores {shown}, expected 0 to {len(here) - 1}. Something else holds cores there. Wait "
                "for it, ask for as many workers as there are cores, or set core_assignment: ray."
            )
        return None
    if len(given) != len(here) or len(set(given)) != len(given):
        raise UserError(
            f"train.backend.core_assignment=ray needs a core of Ray's for each worker: node {own.node_id} has "
            f"{len(here)} workers and the cores {shown}. Unset RAY_EXPERIMENTAL_NOSET_NEURON_RT_VISIBLE_CORES, or set "
            "core_assignment: local_rank."
        )
    order = sorted(place.local_rank for place in here)
    return str(given[order.index(own.local_rank)])
