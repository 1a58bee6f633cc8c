"""Which of torch's operators a graph for the device may hold: op_table.toml, read and asked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Tier = Literal["deny", "warn", "ok"]
FILE = Path(__file__).with_name("op_table.toml")


class Verdict(NamedTuple):
    tier: Tier
    reason: str


@dataclass(frozen=True)
class OpTable:
    """verdicts: by operator, with its overload or without. float32: those whose results may not be in 16 bits."""

    verdicts: dict[str, Verdict]
    float32: frozenset[str]

    def verdict(self, op: str) -> Verdict | None:
        """Of an operator such as aten.mm.default: that of its overload, or else of all; None: it is not listed."""
        return self.verdicts.get(op) or self.verdicts.get(op.rpartition(".")[0])

    def needs_float32(self, op: str) -> bool:
        return op.rpartition(".")[0] in self.float32


@cache
def op_table(file: Path = FILE) -> OpTable:
    """The table that comes with the package. Raises: ValueError: an operator is in it twice."""
    read = tomllib.loads(file.read_text(encoding="utf-8"))
    verdicts: dict[str, Verdict] = {}
    for tier in get_args(Tier):
        for reason, ops in read[tier].items():
            for op in ops:
                if op in verdicts:
                    raise ValueError(f"{file.name}: {op} is listed twice; give it one tier.")
                verdicts[op] = Verdict(tier, reason)
    return OpTable(verdicts, frozenset(read["float32"]["ops"]))
