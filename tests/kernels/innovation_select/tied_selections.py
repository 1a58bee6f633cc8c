"""Selections full of exact ties under forgetting, and their results by exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.innovation_select import innovation_select, innovation_step
from kernels.operator import use


def select(path: str, scores: Tensor, position: Tensor, **options: Any) -> Tensor:
    with use(path):
        return innovation_select(scores, position, **options)


@dataclass(frozen=True)
class TiedSelection:
    """One sequence of scores, all of them exact in float32. None: never kept."""

    scores: list[Fraction | None]
    tau: float
    chunk_size: int
    window_size: int
    num_eidetic: int
    dtype: torch.dtype

    def expected(self) -> list[list[int]]:
        """The positions of every chunk's set, best first, ranked by log e_i + i / tau without rounding."""
        sets = []
        for boundary in range(0, len(self.scores), self.chunk_size):
            candidates = enumerate(self.scores[: max(0, boundary - self.window_size + 1)])
            ranked = sorted((-(score + i / Fraction(self.tau)), i) for i, score in candidates if score is not None)
            sets.append([i for _, i in ranked[: self.num_eidetic]])
        return sets

    def selected(self, path: str) -> list[list[int]]:
        """The sets of innovation_select."""
        index_bjm = select(
            path,
            self._log_e(),
            torch.arange(len(self.scores))[None],
            num_queries=len(self.scores),
            chunk_size=self.chunk_size,
            window_size=self.window_size,
            num_eidetic=self.num_eidetic,
            tau=self.tau,
        )
        return [[row for row in rows if row >= 0] for rows in index_bjm[0].tolist()]

    def merged(self, path: str) -> list[list[int]]:
        """The sets of innovation_step, where each chunk begins; Triton's slots hold scores in float32."""
        dtype = torch.float32 if path == "triton" else self.dtype
        size, slots = self.window_size + self.chunk_size, self.num_eidetic
        y, rows, kept = torch.zeros(1, 1), torch.zeros(1, size, 1, 1), torch.zeros(1, slots, 1, 1)
        log_e_1s, log_e_1r = self._log_e().to(dtype), torch.zeros(1, size, dtype=dtype)
        slot_log_e, slot_position = torch.zeros(1, slots, dtype=dtype), torch.full((1, slots), -1)
        sets = []
        for position in range(len(self.scores)):
            if position % self.chunk_size == 0:
                with use(path):
                    innovation_step(
                        y, torch.tensor([position]), torch.ones(1, 1), torch.zeros(1, 1, 1), log_e_1r, rows, rows,
                        kept, kept.clone(), slot_log_e, slot_position, log_e_1s[:, position], self.chunk_size, self.tau,
                    )  # fmt: skip
                sets.append([place for place in slot_position[0].tolist() if place >= 0])
            log_e_1r[0, position % size] = log_e_1s[0, position]
        return sets

    def _log_e(self) -> Tensor:
        scores = [float("-inf") if score is None else float(score) for score in self.scores]
        return torch.tensor([scores], dtype=self.dtype)


@st.composite
def tied_selections(draw: st.DrawFn) -> TiedSelection:
    """Scores and tau are small multiples of powers of two, so that ties are common and i / tau is seldom a float."""
    window_size = draw(st.integers(1, 8))
    unit = Fraction(1, draw(st.sampled_from([1, 2, 8])))
    return TiedSelection(
        scores=draw(
            st.lists(st.none() | st.integers(-6, 6).map(lambda number: number * unit), min_size=1, max_size=40)
        ),
        tau=draw(st.sampled_from([0.375, 1.0, 3.0, 5.0, 7.0, 10.5, 1000.0])),
        chunk_size=draw(st.integers(1, window_size)),
        window_size=window_size,
        num_eidetic=draw(st.sampled_from([1, 3, 8])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
