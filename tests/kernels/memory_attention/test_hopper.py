"""Memory attention's kernels for Hopper in the Gluon interpreter: outputs and every gradient against the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Config
from kernels.memory_attention import hopper_plan, triton_plan
from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.memory_attention.test_triton import Case, assert_matches_reference

DEVICE_CODE = [f"kernels.memory_attention.hopper_{name}" for name in ("tiles", "forward", "backward")]
PLAIN = Case(t=200, w=70, c=128, m=20, h=1, p=64, dtype=torch.float16)
CASES = {
    "all sets": PLAIN,
    "a second program, slots in two tiles": replace(PLAIN, t=270, m=70),
    "grouped heads": replace(PLAIN, t=100, w=40, c=64, h=4, kv_heads=2),
    "three heads in a group": replace(PLAIN, t=90, w=40, c=42, h=3),
    "documents": replace(PLAIN, t=330, documents=True),
    "one document after another": replace(PLAIN, lengths=(150, 50)),
    "window only": replace(PLAIN, m=0, fading=False),
    "window and fading memory": replace(PLAIN, m=0),
    "a past": replace(PLAIN, t=90, num_past=150, batch=2),
    "chunks that end within a tile": replace(PLAIN, t=150, c=50),
}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels for Hopper, whatever the sizes; in the interpreter, unless the tests run on a GPU."""
    original, launch = triton_plan.pick, Launch.run

    def pick(kernel: str, *args: Any) -> Config:
        found = hopper_plan.CONFIGS.get(kernel)
        return found[-1] if found else original(kernel, *args)

    monkeypatch.setattr(triton_plan, "pick", pick)
    if os.environ["TRITON_INTERPRET"] != "1":
        yield
        return
    with interpreted(*DEVICE_CODE) as run_gluon:
        monkeypatch.setattr(Launch, "run", lambda self: run_gluon(self) if self.is_gluon else launch(self))
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_match_the_reference(case: Case) -> None:
    assert_matches_reference(case)
