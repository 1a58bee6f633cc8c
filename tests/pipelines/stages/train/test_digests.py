"""A tensor's digest is that of its elements and places, however it is cut."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from pipelines.stages.train import digests
from pipelines.stages.train.digests import COLUMNS, added, digests_of
from pipelines.stages.train.pieces import Piece


def weight(index: int, seed: int) -> int:
    """SplitMix64, made odd."""
    mixed = (index * 2 + seed) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (mixed ^ mixed >> 31) | 1


def reference(values: torch.Tensor) -> str:
    """The definition, with Python's numbers."""
    total = 0
    for index, bits in enumerate(values.view(torch.int32).tolist()):
        total += (bits + 1) * weight(index % COLUMNS, 2) * weight(index // COLUMNS, 1)
    return f"{total % (1 << 64):016x}"


def whole(values: torch.Tensor) -> str:
    return added([digests_of({"w": Piece(0, values)})])["w"]


def random_values(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_it_is_as_defined_and_the_same_in_any_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(digests, "_CPU_ROWS", rows)
    values = random_values(5 * COLUMNS + 77)
    cuts = [0, *sorted(random.Random(1).sample(range(1, len(values)), 5)), 3 * COLUMNS, len(values)]
    pieces = [Piece(start, values[start:end]) for start, end in itertools.pairwise(sorted(cuts))]
    assert whole(values) == reference(values)
    assert added(digests_of({"w": piece}) for piece in reversed(pieces)) == {"w": reference(values)}


def test_any_flipped_bit_and_any_two_values_that_change_places_change_it() -> None:
    values = random_values(64)
    seen = {whole(values)}
    for index, bit in itertools.product(range(64), range(32)):
        flipped = values.clone()
        flipped.view(torch.int32)[index] ^= 1 << bit if bit < 31 else -(1 << 31)
        seen.add(whole(flipped))
    for one, other in itertools.combinations(range(64), 2):
        swapped = values.clone()
        swapped[[one, other]] = values[[other, one]]
        seen.add(whole(swapped))
    assert len(seen) == 1 + 64 * 32 + 64 * 63 // 2


def test_rows_that_change_places_change_it() -> None:
    values = random_values(3 * COLUMNS).view(3, COLUMNS)
    assert len({whole(values[list(order)].view(-1)) for order in itertools.permutations(range(3))}) == 6


def test_signs_of_zero_and_lengths_count() -> None:
    assert len({whole(torch.zeros(8)), whole(-torch.zeros(8)), whole(torch.zeros(9))}) == 3
