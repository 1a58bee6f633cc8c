"""Shuffling by a formula: a keyed bijection of [0, size), computed for any position alone, in no memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_ROUNDS = 8
_U64 = np.uint64


@dataclass(frozen=True)
class Permutation:
    """A balanced Feistel network over the least even number of bits that covers `size`, with cycle walking.

    Walking: what falls outside [0, size) is permuted again until it does not; the domain has less than 4 size values,
    so that takes fewer than 4 passes on average. The same size and key give the same order on every machine and
    version of numpy.

    Attributes:
        size: number of values, below 2^62.
        key: what tells this order from others, such as (seed, epoch).
    """

    size: int
    key: tuple[int, ...]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Values (int64) at positions (int64) in [0, size); any shape."""
        values = np.asarray(positions).astype(_U64)
        if self.size < 2:
            return values.astype(np.int64)
        values = self._network(values)
        while (outside := values >= _U64(self.size)).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    @cached_property
    def _half_bits(self) -> int:
        return max(1, -(-(self.size - 1).bit_length() // 2))

    @cached_property
    def _round_keys(self) -> list[np.uint64]:
        text = ",".join(map(str, (self.size, *self.key))).encode()
        digest = hashlib.shake_128(text).digest(8 * _ROUNDS)
        return [_U64(key) for key in np.frombuffer(digest, "<u8")]

    def _network(self, values: np.ndarray) -> np.ndarray:
        shift = _U64(self._half_bits)
        mask = _U64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << shift | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    values = (values ^ values >> _U64(30)) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> _U64(27)) * _U64(0x94D049BB133111EB)
    return values ^ values >> _U64(31)
