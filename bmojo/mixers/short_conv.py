"""A short causal convolution beside attention's projections: a token's query, key and value also see its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bmojo.state import LayerState
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step


@dataclass
class ConvTails(LayerState):
    """The last projections of queries [b, k - 1, c], and of keys and values, which later tokens see."""

    q: Tensor
    kv: Tensor


class ShortConv(nn.Module):
    """x_t + SiLU(sum over lags of w x_{t-lag}), per channel, within a document. Taps start at zero: x as it is."""

    def __init__(self, num_channels: int, num_taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, num_taps))

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x_btc: Tensor, tail: Tensor | None = None, doc_ids_bt: Tensor | None = None) -> Tensor:
        """tail: the last inputs before these, which become the last of these."""
        added_btc, after = causal_conv1d(x_btc, self.weight, tail, doc_ids_bt)
        if tail is not None:
            tail.copy_(after)
        return x_btc + added_btc.to(x_btc.dtype)

    def step(self, x_bc: Tensor, tail: Tensor) -> Tensor:
        """Of one token per row; the tail is updated in place."""
        return x_bc + causal_conv1d_step(x_bc, self.weight, tail).to(x_bc.dtype)

    def empty_tail(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        num_channels, num_taps = self.weight.shape
        return torch.zeros(batch_size, num_taps - 1, num_channels, dtype=dtype, device=device)
