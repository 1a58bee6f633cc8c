"""Token mixers by the names that a layer pattern uses. A mixer class owns all that is known about it: base.Mixer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo.mixers.base import Mixer


class MixerTable(Mapping[str, "type[Mixer[Any]]"]):
    """Classes by name, each imported at the first look-up: names are read without torch, whose import takes seconds."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """places: name -> module of this package and class, as `module:Class`."""
        self._places = places

    def __getitem__(self, name: str) -> type[Mixer[Any]]:
        module, _, class_name = self._places[name].partition(":")
        mixer: type[Mixer[Any]] = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
        return mixer

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


MIXERS = MixerTable(
    {
        "attention": "attention:Attention",
        "swa": "attention:SlidingWindowAttention",
        "mamba": "mamba:Mamba",
        "mamba2": "mamba2:Mamba2",
        "mamba3": "mamba3:Mamba3",
        "gated_deltanet": "gated_deltanet:GatedDeltaNet",
        "kda": "kda:KimiDeltaAttention",
        "bmojo_f": "bmojo:BMojoF",
        "bmojo": "bmojo:BMojo",
    }
)
"""The one list of mixers: config, model, counts, tests and the exported folder derive from it."""
