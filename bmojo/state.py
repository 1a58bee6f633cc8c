"""What a model remembers between tokens while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LayerState = dict[str, Tensor]
"""The tensors one mixer keeps, batch first. The mixer that made it is the only one to read it."""


@dataclass
class DecodingState:
    """One LayerState a layer and how many tokens each row has read. Its size does not depend on position, except
    for layers of full attention, whose key/value cache grows by nature."""

    position_b: Tensor
    layers: list[LayerState]

    @property
    def batch_size(self) -> int:
        return self.position_b.shape[0]

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def clone(self) -> DecodingState:
        """A fork: both go on independently."""
        return DecodingState(self.position_b.clone(), [{k: v.clone() for k, v in s.items()} for s in self.layers])

    def select(self, rows: Tensor) -> DecodingState:
        """A new state of the given rows, which may repeat: selecting [0, 0, 0] forks one document three ways."""
        return DecodingState(self.position_b[rows], [{k: v[rows] for k, v in s.items()} for s in self.layers])

    @classmethod
    def join(cls, parts: list[DecodingState]) -> DecodingState:
        """The rows of all parts, one after the other. Full-attention caches are padded to the longest."""
        layers: list[LayerState] = []
        for states in zip(*(part.layers for part in parts), strict=True):
            layers.append({name: _join([state[name] for state in states]) for name in states[0]})
        return cls(torch.cat([part.position_b for part in parts]), layers)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        tensors = {f"{i}.{k}": v.contiguous() for i, layer in enumerate(self.layers) for k, v in layer.items()}
        save_file({"position": self.position_b, **tensors}, path, metadata={"num_layers": str(len(self.layers))})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> DecodingState:
        tensors = load_file(path, device=str(device))
        position_b = tensors.pop("position")
        layers: list[LayerState] = []
        for name in sorted(tensors, key=lambda name: int(name.split(".", 1)[0])):
            index, key = name.split(".", 1)
            while len(layers) <= int(index):
                layers.append({})
            layers[int(index)][key] = tensors[name]
        return cls(position_b, layers)


def _join(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dim() < 2:
        return torch.cat(tensors)
    longest = max(x.shape[1] for x in tensors)
    padded = [torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], 1) for x in tensors]
    return torch.cat(padded)
