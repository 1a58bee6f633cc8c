"""Which learning rate is best at several widths, with and without `transfer`: `python -m benchmarks.transfer`."""

from __future__ import annotations

import argparse
import json

import torch

from tests.pipelines.stages.train.optimizers.transfer_check import last_loss

WIDTHS = (32, 64, 128)
RATES = tuple(1e-3 * 2**power for power in range(1, 7))


def sweep(transfers: bool, num_steps: int) -> dict[int, dict[float, float]]:
    """Last losses by width and rate."""
    return {width: {rate: last_loss(width, transfers, rate, num_steps) for rate in RATES} for width in WIDTHS}


def main() -> None:
    """Print a table for each, and all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    found = {}
    for transfers in (True, False):
        losses = found["with transfer" if transfers else "without"] = sweep(transfers, steps)
        print(f"\n{'With' if transfers else 'Without'} transfer, {steps} steps: loss by learning rate; * is the best")
        print("| d_model | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
        for width, by_rate in losses.items():
            best = min(by_rate, key=lambda rate: by_rate[rate])
            cells = [f"{loss:.3f}{'*' if rate == best else ''}" for rate, loss in by_rate.items()]
            print(f"| {width} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
