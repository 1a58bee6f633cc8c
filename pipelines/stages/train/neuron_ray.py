"""Ray Train's process group over NeuronCores: cores are assigned and TorchNeuron is imported before it is made.

Ray's own TorchXLAConfig is for an older runtime. Ray sets NEURON_RT_VISIBLE_CORES to ids in no order of ranks, and its
get_device knows no NeuronCore (docs/design/0070).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipelines.neuron import runtime
from pipelines.neuron.environment import VISIBLE_CORES, CompilerSettings, CoreAssignment, Place, prepare_env
from pipelines.stages.train.environment import change_environment, current_environment


@dataclass
class NeuronTorchConfig(TorchConfig):
    """Attributes: as those of NeuronConfig."""

    backend: str | None = runtime.PROCESS_GROUP
    core_assignment: CoreAssignment = "local_rank"
    cache_dir: str | None = None
    compiler_flags: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        """See TorchConfig."""
        return NeuronBackend


class NeuronBackend(_TorchBackend):
    """What Ray Train calls before the workers' function."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Prepare every worker, then make the process group, which starts the runtime.

        Raises: UserError: the cores cannot be assigned so, or a machine has no TorchNeuron.
        """
        assert isinstance(backend_config, NeuronTorchConfig)
        places: Sequence[Place] = worker_group.execute(_place)
        compiler = CompilerSettings(backend_config.cache_dir, backend_config.compiler_flags)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _prepare, places, rank, backend_config.core_assignment, compiler
                )
                for rank in range(len(worker_group))
            ]
        )
        super().on_start(worker_group, backend_config)


def _place() -> Place:
    """Of this worker."""
    visible = current_environment().get(VISIBLE_CORES)
    return Place(
        node_id=ray.get_runtime_context().get_node_id(),
        local_rank=ray.train.get_context().get_local_rank(),
        cores=None if visible is None else tuple(int(core) for core in visible.split(",") if core),
    )


def _prepare(places: Sequence[Place], rank: int, assignment: CoreAssignment, compiler: CompilerSettings) -> None:
    """Set this worker's environment, then import TorchNeuron."""
    change_environment(prepare_env(places, rank, assignment, compiler, current_environment()))
    runtime.require()
