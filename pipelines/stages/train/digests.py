"""Digests of tensors that do not depend on how these are cut into pieces, computed where the values are.

The digest of a tensor is a sum modulo 2^64 over its elements: (bits + 1) * column[index % 2^15] * row[index // 2^15],
where `bits` are an element's 32 bits as a signed number, `index` is its place in the flattened tensor, and the weights
are odd pseudo-random numbers. So pieces are digested apart and their digests added. One changed element always changes
the sum, and any other change goes unseen with a chance of about 2^-32 (multilinear hashing: Carter and Wegman 1979).
It guards against faults, not against attackers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
import torch.distributed as dist

from pipelines.stages.train.device import exact_device
from pipelines.stages.train.pieces import Piece

COLUMNS = 1 << 15
_MODULUS = 1 << 64
# Rows at a time: on a CPU they stay in the cache, and one thread does them, beside those that train.
_CPU_ROWS, _GPU_ROWS = 1, 1 << 10


def digest(piece: Piece) -> torch.Tensor:
    """A piece's part of its tensor's digest: an int64 scalar, on the piece's device if it has 64 bits.

    The host does not wait for such a device.
    """
    device = exact_device(piece.values.device)
    columns, sums = _columns(device)
    bits = piece.values.to(device).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for first, end in _parts(piece.start, bits.numel(), _CPU_ROWS if device.type == "cpu" else _GPU_ROWS):
        part, at = bits[first:end], (piece.start + first) % COLUMNS
        row = (piece.start + first) // COLUMNS
        if part.numel() <= COLUMNS - at:  # of one row
            stop = at + part.numel()
            products = (part * columns[at:stop]).sum() + (sums[stop] - sums[at])
            total += products * _as_int64(_weight(row, _ROWS))
        else:
            products = (part.view(-1, COLUMNS) * columns).sum(1) + sums[COLUMNS]
            weights = [_as_int64(_weight(row + index, _ROWS)) for index in range(products.numel())]
            total += (products * torch.tensor(weights).to(device)).sum()
    return total


def digests_of(pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Of each piece, as a number from 0 to 2^64 - 1."""
    if not pieces:
        return {}
    values = torch.stack([digest(piece).cpu() for piece in pieces.values()]).tolist()
    return {key: value % _MODULUS for key, value in zip(pieces, values, strict=True)}


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Digests of whole tensors, 16 hexadecimal digits each, from those of the pieces of all ranks."""
    totals: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            totals[key] = (totals.get(key, 0) + value) % _MODULUS
    return {key: f"{total:016x}" for key, total in sorted(totals.items())}


def whole_digests(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Digests of the whole tensors, the same on every rank. A collective."""
    of_ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, digests_of(pieces))
    return added(of_ranks)


def _parts(start: int, numel: int, rows: int) -> Iterator[tuple[int, int]]:
    """The piece cut where rows begin, whole rows several at a time."""
    first = 0
    while first < numel:
        at = (start + first) % COLUMNS
        whole_rows = (numel - first) // COLUMNS
        size = COLUMNS - at if at or not whole_rows else COLUMNS * min(rows, whole_rows)
        yield first, min(first + size, numel)
        first += size


_ROWS, _COLUMNS = 1, 2  # seeds


def _weight(index: int, seed: int) -> int:
    """An odd number: SplitMix64 (Steele, Lea, Flood 2014) of the index."""
    mixed = (index * 2 + seed) * 0x9E3779B97F4A7C15 % _MODULUS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % _MODULUS
    return mixed ^ (mixed >> 31) | 1


@cache
def _columns(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the columns, and the sums of those before each column."""
    weights = torch.tensor([_as_int64(_weight(index, _COLUMNS)) for index in range(COLUMNS)])
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), weights.cumsum(0)])
    return weights.to(device), sums.to(device)


def _as_int64(number: int) -> int:
    """The int64 that equals a number modulo 2^64."""
    return (number + _MODULUS // 2) % _MODULUS - _MODULUS // 2
