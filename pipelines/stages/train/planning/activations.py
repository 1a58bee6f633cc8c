"""Bytes of a micro batch's activations, taken from the model itself: forward and backward on fake tensors.

Nothing here knows what a layer saves. The model runs on tensors without memory, along the operators' paths of the
device it is planned for (kernels.shapes_only), and every storage that it makes is counted while it is alive. Deep
models are not run whole: a further layer of a kind adds what the third one added (tested against whole models).
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo import BMojoLM, ModelConfig
from bmojo.fields import ActivationCheckpointing
from bmojo.float8 import mark_float8
from kernels.shapes_only import Device, shapes_only
from pipelines.stages.train.planning.live_memory import LiveMemory


class Activations(NamedTuple):
    """Bytes of one micro batch, without parameters and their gradients."""

    saved: int
    """After the forward: what the backward will read."""
    peak: int
    """At most: as a rule when the loss is computed, or in the backward of the last layer."""
    bottom: int
    """At most, while the backward is in the first layers and nearly all gradients of parameters are there."""


@lru_cache(maxsize=64)
def activations(
    model: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    device: Device,
    bf16: bool,
    checkpointing: ActivationCheckpointing = "none",
    float8: bool = False,
) -> Activations:
    """Bytes that a micro batch of (micro_batch_size, seq_len) tokens takes beside parameters and gradients.

    Args: model: with vocab_size. bf16: under autocast. checkpointing: which parts are computed again in the backward.
        float8: projections in it.
    """
    counts = Counter(model.mixers)

    def run(layers: Counter[str]) -> WholeRun:
        return run_whole(_with_layers(model, layers), micro_batch_size, seq_len, device, bf16, checkpointing, float8)

    one = run(Counter(dict.fromkeys(counts, 1)))
    few_layers = Counter({kind: min(count, 2) for kind, count in counts.items()})
    few = run(few_layers) if few_layers.total() > len(counts) else one
    saved, peak = few.saved, few.peak
    for kind, count in counts.items():
        if count > 2:
            more = run(few_layers + Counter([kind]))
            saved += (count - 2) * (more.saved - few.saved)
            peak += (count - 2) * (more.peak - few.peak)
    return Activations(saved, peak, one.peak)


def _with_layers(model: ModelConfig, layers: Counter[str]) -> ModelConfig:
    """The model with the last so many layers of each kind, in their order: memory peaks at the last ones. If layers
    have different numbers of slots, all have the most."""
    left = Counter(layers)
    kept = []
    for kind in reversed(model.mixers):
        if left[kind] > 0:
            left[kind] -= 1
            kept.append(kind)
    slots = model.num_eidetic if isinstance(model.num_eidetic, int) else max(model.num_eidetic)
    return model.replace(pattern=",".join(reversed(kept)), num_eidetic=slots)


class WholeRun(NamedTuple):
    """Bytes beside parameters and gradients: after the forward, and at most."""

    saved: int
    peak: int


def run_whole(
    config: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    device: Device,
    bf16: bool,
    checkpointing: ActivationCheckpointing,
    float8: bool = False,
) -> WholeRun:
    """As `activations`, of every layer: seconds for a deep model."""
    with torch.device("meta"):
        model = BMojoLM(config)
    model.checkpoint_activations(checkpointing)
    if float8:
        mark_float8(model)
    with FakeTensorMode(), shapes_only(device), LiveMemory() as memory:
        materialize(model)
        _free_gradients(model)
        tokens_bt = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
        before, memory.peak = memory.now, memory.now
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(tokens_bt, tokens_bt, tokens_bt).loss
        assert loss is not None
        saved = memory.now - before
        loss.backward()
        return WholeRun(saved, memory.peak - before)


def materialize(model: BMojoLM) -> None:
    """Parameters as fake tensors of the CPU, in place of those of the meta device."""
    model._apply(lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight


def _free_gradients(model: BMojoLM) -> None:
    """Drop each parameter's gradient when it is complete: they are counted with the states."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
