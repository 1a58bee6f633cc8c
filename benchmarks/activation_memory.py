"""What a training step keeps between its forward and its backward, tensor by tensor; no GPU is needed.

The model runs on tensors without memory along the operators' paths for a GPU (kernels.shapes_only), as memory is
planned. A layer's share is what a third layer adds to two. A tensor that several read is listed once, where it is made.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NamedTuple, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks._peers import build, num_params
from benchmarks.train_step_gpu import config_of
from benchmarks.train_step_gpu import parser as step_parser
from bmojo import BMojoLM, ModelConfig
from bmojo.fields import ActivationCheckpointing
from bmojo.mixers import MIXERS
from kernels.shapes_only import shapes_only
from pipelines.stages.train.planning.activations import activations, materialize
from pipelines.stages.train.planning.live_memory import LiveMemory

ROOT = Path(__file__).parents[1]
STATES = {"parameters": 4, "AdamW's moments": 8, "gradients": 4}  # bytes per parameter
HEADER = "| made in | for | tensors | MiB | bytes per token |\n| --- | --- | --: | --: | --: |"
MIB = 2**20


class Maker(NamedTuple):
    """Functions that a tensor was made in: the innermost of kernels, and the innermost of bmojo."""

    operator: str
    layer: str


class LabelledMemory(LiveMemory):
    """Knows who made the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Maker, int]] = {}
        self._made = 0

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._made += 1
            self.alive[self._made] = maker_of(sys._getframe()), storage.nbytes()
            weakref.finalize(storage, self.alive.pop, self._made)
        super()._count(storage)


def maker_of(frame: FrameType | None) -> Maker:
    """The functions nearest to a frame; "" for one that is not there."""
    found: dict[str, str] = {}
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv"):
            name = path.relative_to(ROOT)
            if name.parts[0] in ("kernels", "bmojo") and name.name != "operator.py":
                place = f"{name.relative_to(name.parts[0]).with_suffix('')}: {frame.f_code.co_name}"
                found.setdefault(name.parts[0], place)
        frame = frame.f_back
    return Maker(found.get("kernels", ""), found.get("bmojo", ""))


def kept(config: ModelConfig, rows: int, seq_len: int, part: ActivationCheckpointing) -> dict[Maker, tuple[int, int]]:
    """Tensors and bytes alive after the forward, beside parameters, by maker."""
    with torch.device("meta"):
        model = BMojoLM(config)
    model.checkpoint_activations(part)
    with FakeTensorMode(), shapes_only("gpu"), LabelledMemory() as memory:
        materialize(model)
        tokens_bt = torch.zeros(rows, seq_len, dtype=torch.long)
        before = set(memory.alive)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens_bt, tokens_bt).loss
        tensors, sizes = Counter[Maker](), Counter[Maker]()
        for key, (maker, size) in memory.alive.items():
            if key not in before:
                tensors[maker] += 1
                sizes[maker] += size
        del loss
    return {maker: (tensors[maker], sizes[maker]) for maker in sizes}


def of_a_layer(
    config: ModelConfig, mixer: str, rows: int, seq_len: int, part: ActivationCheckpointing
) -> dict[Maker, tuple[int, int]]:
    """What a further layer of that mixer keeps, by maker."""
    two, three = (kept(config.replace(pattern=f"{mixer}*{n}"), rows, seq_len, part) for n in (2, 3))
    rest = {maker: tuple(a - b for a, b in zip(three[maker], two.get(maker, (0, 0)), strict=True)) for maker in three}
    return {maker: (count, size) for maker, (count, size) in rest.items() if size}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    base = config_of(options)
    with torch.device("meta"):
        target = num_params(BMojoLM(base))
    seq_len = options.seq_len[0]
    rows = options.tokens // seq_len
    for name in options.models:
        with torch.device("meta"):
            model = BMojoLM(base) if name == "bmojo" else build(name, base, target)
        assert isinstance(model, BMojoLM)
        for part in options.recompute:
            print(f"\n{name}, {rows} x {seq_len} tokens, again in the backward: {part}\n\n{HEADER}")
            layer = of_a_layer(model.config, name, rows, seq_len, part)
            for maker, (count, size) in sorted(layer.items(), key=lambda item: -item[1][1]):
                print(f"| {maker.operator} | {maker.layer} | {count} | {_columns(size, options.tokens)} |")
            total = sum(size for _, size in layer.values())
            print(f"| all of a layer | | | {_columns(total, options.tokens)} |")
            print(f"\n{_sum(model, rows, seq_len, part)}")
    return 0


def _columns(size: int, tokens: int) -> str:
    return f"{size / MIB:,.1f} | {size / tokens:,.0f}"


def _sum(model: BMojoLM, rows: int, seq_len: int, part: ActivationCheckpointing) -> str:
    """What a step takes at most, without the allocator's holes."""
    planned = activations(model.config, rows, seq_len, "gpu", bf16=True, checkpointing=part)
    parts = {name: size * num_params(model) for name, size in STATES.items()}
    parts |= {"kept for the backward": planned.saved, "beside it, at most": planned.peak - planned.saved}
    told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"GiB: {told}; all {sum(parts.values()) / 2**30:.2f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = step_parser("python -m benchmarks.activation_memory", __doc__)
    parser.set_defaults(seq_len=[8192], models=["bmojo", "attention", "mamba2"], recompute=["none", "pointwise"])
    options = parser.parse_args(arguments)
    if not set(options.models) <= MIXERS.keys() or not set(options.recompute) <= set(get_args(ActivationCheckpointing)):
        parser.error(f"the models are {', '.join(MIXERS)}, and layers of one kind")
    return options


if __name__ == "__main__":
    sys.exit(main())
