"""Steps of tensors without memory on a device named neuron: a program, because the name is given once in a process.

It prints a line per step: its name, and what stopped it.
"""

from __future__ import annotations

from bmojo.mixers import MIXERS
from pipelines.neuron.checks.fake_step import CAUGHT, fake_step
from pipelines.neuron.checks.registration import register
from tests.bmojo.model_family import small_config
from tests.pipelines.neuron.planted import FAULTS, planted


def stopped_by(pattern: str) -> str:
    config = small_config(pattern=pattern, window_size=128, chunk_size=64, d_ff=8)
    try:
        return str(fake_step(config, seq_len=512, batch=2).device)
    except CAUGHT as error:
        return type(error).__name__


def main() -> None:
    register()
    print("all mixers:", stopped_by(",".join(MIXERS)))
    for name in ("item", "boolean index", "cpu tensor"):
        with planted(FAULTS[name]):
            print(f"{name}:", stopped_by("swa"))


if __name__ == "__main__":
    main()
