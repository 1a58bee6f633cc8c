"""The causal convolution's inputs, outputs and meaning: each output from the last positions, tap by tap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path, random_tensors


class ConvInputs(NamedTuple):
    """y_t = SiLU(sum_k weight_k x_{t-K+1+k}), channel by channel, over positions of the same document.

    Args:
        x_btd: input.  weight_dk: K taps per channel, the last one multiplying the current position.
        initial_btd: the K - 1 inputs before the first; zeros if None. Passes no gradient. Not with doc_ids_bt.
        doc_ids_bt: document of each position; None: one.
    Returns: y_btd in the dtype of x, and the last K - 1 inputs [b, K - 1, d] to continue from.
    Raises: ValueError: initial_btd and doc_ids_bt together; on the C++ path, shapes that do not go together.
    """

    x_btd: Tensor
    weight_dk: Tensor
    initial_btd: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class ConvOutputs(NamedTuple):
    y_btd: Tensor
    tail_btd: Tensor


class StepInputs(NamedTuple):
    """The next output of each row, for decoding. No gradient passes.

    Args:
        x_bd: input.  weight_dk: K taps per channel.
        state_bkd: the last K - 1 inputs, oldest first; x_bd is added in place and the oldest goes.
    Returns: y_bd, in the wider dtype of x and weight.
    """

    x_bd: Tensor
    weight_dk: Tensor
    state_bkd: Tensor


def check(inputs: ConvInputs) -> None:
    """Raise ValueError if there are both an initial state and documents."""
    if inputs.initial_btd is not None and inputs.doc_ids_bt is not None:
        raise ValueError("causal_conv1d continues one document: give initial_btd or doc_ids_bt, not both.")


def tail(inputs: ConvInputs) -> Tensor:
    """The last K - 1 inputs, to continue from."""
    x_btd, weight_dk, initial_btd, _ = inputs
    past = weight_dk.shape[1] - 1
    tail_btd = x_btd.detach()[:, -past:]
    if tail_btd.shape[1] < past:
        zeros = x_btd.new_zeros(x_btd.shape[0], past, x_btd.shape[2])
        tail_btd = torch.cat([zeros if initial_btd is None else initial_btd.to(x_btd.dtype), tail_btd], 1)[:, -past:]
    return tail_btd


def _run(inputs: ConvInputs) -> ConvOutputs:
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    t, width = x_btd.shape[1], weight_dk.shape[1]
    if initial_btd is None:
        initial_btd = x_btd.new_zeros(x_btd.shape[0], width - 1, x_btd.shape[2])
    extended = torch.cat([initial_btd.to(x_btd.dtype), x_btd], 1)
    outputs = []
    for i in range(t):
        total = torch.zeros_like(x_btd[:, 0])
        for lag in range(min(width, i + width)):
            tap = extended[:, i + width - 1 - lag] * weight_dk[:, width - 1 - lag].to(x_btd.dtype)
            if doc_ids_bt is not None:
                same = i >= lag and doc_ids_bt[:, i] == doc_ids_bt[:, i - lag]
                tap = tap * torch.as_tensor(same, device=tap.device).to(tap.dtype).reshape(-1, 1)
            total = total + tap
        outputs.append(F.silu(total))
    return ConvOutputs(torch.stack(outputs, 1), extended[:, t:].detach())


causal_conv1d = Path(_run)


def example() -> ConvInputs:
    """A small call with documents."""
    x_btd, weight_dk = random_tensors((2, 13, 6), (6, 4))
    return ConvInputs(x_btd, weight_dk, doc_ids_bt=torch.tensor([[0] * 13, [0] * 5 + [1] * 8]))


def example_step() -> StepInputs:
    """One step of two rows."""
    return StepInputs(*random_tensors((2, 6), (6, 4), (2, 3, 6)))
