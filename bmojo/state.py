"""What a model remembers between tokens while decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class LayerState:
    """Base of what one mixer keeps: a dataclass of tensors, batch first, and of smaller states; some may be None.

    A dimension that grows with the tokens has size 0 before the first.
    """

    @property
    def room(self) -> int | None:
        """Tokens it can hold without a look at positions, for which the host would wait; None: any number."""
        return None

    def reserve(self, num_tokens: int) -> LayerState:
        """What holds the same, with room for `num_tokens` of a row in all."""
        return self


@dataclass
class DecodingState:
    """One LayerState per layer and how many tokens each row has read. Its size does not depend on position, except
    for layers of full attention, whose key/value cache grows by nature."""

    position_b: Tensor
    layers: list[LayerState]

    @property
    def batch_size(self) -> int:
        return self.position_b.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its path, such as `layers.0.ssm.conv`."""
        found: dict[str, Tensor] = {}
        self._map(found.setdefault)
        return found

    def num_bytes(self) -> int:
        """Size of what the layers keep."""
        tensors = self.tensors()
        del tensors["position_b"]
        return sum(x.numel() * x.element_size() for x in tensors.values())

    @property
    def room(self) -> int | None:
        """Tokens of a row that `step` can read without a wait for a GPU, those read so far included; None: any number.
        0: a layer of full attention has a cache that grows, see `reserve`."""
        return min((layer.room for layer in self.layers if layer.room is not None), default=None)

    def reserve(self, num_tokens: int) -> None:
        """Give caches of full attention room for `num_tokens` of each row, in all. They do not grow from then on, and
        on a GPU nobody checks: the caller counts."""
        self.layers = [layer.reserve(num_tokens) for layer in self.layers]

    def copy_(self, other: DecodingState) -> None:
        """Hold what another state of the same shapes holds, in the same memory."""
        new = other.tensors()
        for path, x in self.tensors().items():
            x.copy_(new[path])

    def put(self, row: int, other: DecodingState) -> None:
        """Hold in a row, in the same memory, what the one row of `other` holds. Caches of full attention must have room
        for it; what is behind it in theirs is left as it was, and not read."""
        new = other.tensors()
        for path, x in self.tensors().items():
            value = new[path][0]
            (x[row, : len(value)] if value.dim() else x[row]).copy_(value)

    def clone(self) -> DecodingState:
        """A fork: both continue independently."""
        return self._map(lambda _, x: x.clone())

    def select(self, rows: Tensor) -> DecodingState:
        """A new state of the given rows, which may repeat: selecting [0, 0, 0] forks one document three ways."""
        return self._map(lambda _, x: x[rows])

    @classmethod
    def join(cls, parts: list[DecodingState]) -> DecodingState:
        """The rows of all parts, one after the other. Full-attention caches are padded to the longest."""
        tensors = [part.tensors() for part in parts]
        return parts[0]._map(lambda path, _: _join([of_part[path] for of_part in tensors]))

    def save(self, file: str | Path) -> None:
        """Write to a safetensors file."""
        save_file({path: x.contiguous() for path, x in self.tensors().items()}, file)

    @classmethod
    def load(cls, file: str | Path, like: DecodingState) -> DecodingState:
        """Read what `save` wrote.

        Args: like: the state before the first token, model.init_state(1), of the model that is to continue.
        Raises: ValueError: the file is damaged, or another model or another version of this program wrote it.
        """
        try:
            found = load_file(file, device=str(like.position_b.device))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or no decoding state: {error}.") from error
        return cls.from_tensors(found, like, str(file))

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor], like: DecodingState, name: str) -> DecodingState:
        """The state of which `tensors` gave these.

        Args: like: as for `load`. name: of what holds them, for errors.
        Raises: ValueError: they are not those of such a state.
        """
        expected = like.tensors()
        for path in sorted(found.keys() ^ expected.keys()):
            raise ValueError(
                f"{name} {'holds' if path in found else 'lacks'} {path}: another model, or another version of this "
                "program, wrote this state. Read the tokens again with prefill."
            )
        batch_size = len(found["position_b"])
        for path, x in sorted(found.items()):
            sizes = [batch_size, *expected[path].shape[1:]]
            fits = len(sizes) == x.dim() and all(size in (0, x.shape[i]) for i, size in enumerate(sizes))
            if not fits or x.dtype != expected[path].dtype:
                raise ValueError(
                    f"{name}: {path} is {x.dtype} {list(x.shape)}, expected {expected[path].dtype} {sizes}: another "
                    "model wrote this state. Load it for that model, or read the tokens again with prefill."
                )
        return like._map(lambda path, _: found[path])

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> DecodingState:
        """A state of the same structure, of function(path, tensor) of each tensor."""
        mapped: DecodingState = _map(self, function, "")
        return mapped


def _map(value: Any, function: Callable[[str, Tensor], Tensor], path: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(path, value)
    prefix = f"{path}." if path else ""
    if isinstance(value, list):
        return [_map(inner, function, f"{prefix}{i}") for i, inner in enumerate(value)]
    inner = {field.name: getattr(value, field.name) for field in fields(value)}
    return type(value)(**{name: _map(x, function, f"{prefix}{name}") for name, x in inner.items()})


def _join(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dim() < 2:
        return torch.cat(tensors)
    longest = max(x.shape[1] for x in tensors)
    padded = [torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], 1) for x in tensors]
    return torch.cat(padded)
