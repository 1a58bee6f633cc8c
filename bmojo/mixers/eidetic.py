"""The eidetic memory: what innovation selection chooses from, and what decoding keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bmojo.mixers import ring
from bmojo.mixers.attention import RingCache
from bmojo.state import LayerState
from kernels.innovation_select import innovation_step


class Candidates(NamedTuple):
    """Tokens that may be kept: rows of the sequence at hand, behind those that the decoding state holds."""

    k: Tensor  # not rotated: slots are seen at a constant distance
    v: Tensor
    log_e: Tensor  # scores of the selection rule; -inf: never kept
    position: Tensor  # -1: an empty slot

    def behind(self, past: Candidates) -> Candidates:
        """Those of the past, then these."""
        return Candidates(*(torch.cat(pair, 1) for pair in zip(past, self, strict=True)))

    def positions(self, row_bjm: Tensor) -> Tensor:
        """Positions of the given rows; -1 for a row of -1."""
        batch = torch.arange(row_bjm.shape[0], device=row_bjm.device)[:, None, None]
        return torch.where(row_bjm >= 0, self.position[batch, row_bjm.clamp_min(0)], -1)


@dataclass
class Slots(LayerState):
    """The eidetic set; as Candidates, with M rows."""

    k: Tensor
    v: Tensor
    log_e: Tensor
    position: Tensor

    def choose(self, candidates: Candidates, row_bm: Tensor, full_bm: Tensor) -> None:
        """Hold the given rows of the candidates; slots that are not full are empty."""
        batch = torch.arange(row_bm.shape[0], device=row_bm.device)[:, None]
        self.k.copy_(candidates.k[batch, row_bm])
        self.v.copy_(candidates.v[batch, row_bm])
        self.log_e.copy_(candidates.log_e[batch, row_bm])
        self.position.copy_(torch.where(full_bm, candidates.position[batch, row_bm], -1))


@dataclass
class EideticState(LayerState):
    """The slots, and what it takes to refill them: of the last W + C tokens, and of the last outputs of the SSM."""

    k: Tensor  # ring, not rotated; the values are the window's
    log_e: Tensor  # ring
    y: Tensor | None  # of the last K tokens, which the innovation's predictor reads; None: the rule has no use for it
    slots: Slots

    @classmethod
    def empty(cls, window: RingCache, num_slots: int, num_outputs: int, d_model: int) -> EideticState:
        """Beside the ring of the window, whose batch size, heads, dtype and device it takes."""
        (batch_size, recent, *heads), dtype, device = window.k.shape, window.k.dtype, window.k.device
        precise = torch.promote_types(dtype, torch.float32)

        def keys(size: int) -> Tensor:
            return ring.zeros(batch_size, size, heads[0], heads[1], dtype, device)

        slots = Slots(
            keys(num_slots),
            keys(num_slots),
            log_e=torch.zeros(batch_size, num_slots, dtype=precise, device=device),
            position=torch.full((batch_size, num_slots), -1, dtype=torch.long, device=device),
        )
        log_e = torch.zeros(batch_size, recent, dtype=precise, device=device)
        y = torch.zeros(batch_size, num_outputs, d_model, dtype=dtype, device=device) if num_outputs else None
        return cls(keys(recent), log_e, y, slots)

    def before(self, position: int, window_v: Tensor) -> Candidates:
        """The slots, then the tokens before `position`, whose values are window_v."""
        recent = torch.arange(position - window_v.shape[1], position, device=window_v.device)
        slots = self.slots
        return Candidates(
            k=torch.cat([slots.k, ring.in_order(self.k, position)], 1),
            v=torch.cat([slots.v, window_v], 1),
            log_e=torch.cat([slots.log_e, ring.in_order(self.log_e, position)], 1),
            position=torch.cat([slots.position, recent.expand(window_v.shape[0], -1)], 1),
        )

    def refill(self, candidates: Candidates, y_btd: Tensor, kept_bm: Tensor, end: int) -> None:
        """Hold what candidates that end just before position `end` leave; kept_bm: rows of the last set, -1 if none."""
        ring.refill(self.k, candidates.k, end)
        ring.refill(self.log_e, candidates.log_e, end)
        self.push(y_btd)
        self.slots.choose(candidates, kept_bm.clamp_min(0), kept_bm >= 0)

    def hold(
        self,
        y_bd: Tensor,
        position_b: Tensor,
        weight_kd: Tensor,
        given_b: Tensor | None,
        window_v: Tensor,
        chunk_size: int,
        tau: float | None,
    ) -> None:
        """Add a token per row, whose value is in the window's ring, and refill the slots where a chunk begins.

        Args: weight_kd: of the innovation's predictor.  given_b: log scores; None: the innovation's.
        """
        past_bkd = self.y
        if past_bkd is None:  # the operator always pushes outputs: a single channel stands in
            y_bd, weight_kd = y_bd[:, :1], weight_kd[:1, :1]
            past_bkd = torch.zeros_like(y_bd)[:, None]
        slots = self.slots
        innovation_step(
            y_bd, position_b, weight_kd, past_bkd, self.log_e, self.k, window_v,
            slots.k, slots.v, slots.log_e, slots.position, given_b, chunk_size, tau,
        )  # fmt: skip

    def push(self, y_btd: Tensor) -> None:
        """Add outputs of the SSM to the last K."""
        if self.y is not None:
            self.y.copy_(torch.cat([self.y, y_btd.to(self.y.dtype)], 1)[:, -self.y.shape[1] :])
