"""Handwritten digits as token ids, and digits that a model of them draws. pipeline.yaml beside this file uses both.

A digit is a document of 65 ids: its label (17 for a 0 to 26 for a 9), then 8 x 8 pixels row by row, 0 to 16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import image

from bmojo.checkpoint_io import load_pretrained
from bmojo.generation import generate
from pipelines.stages.python import RunningStage

NUM_SHADES, NUM_LABELS, SIDE = 17, 10, 8
EOD = NUM_SHADES + NUM_LABELS


def ids_of_digits() -> np.ndarray:
    """The 1,797 digits that scikit-learn ships, (digit, 65), uint8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack((NUM_SHADES + digits.target, digits.data)).astype(np.uint8)


def draw(stage: RunningStage) -> dict[str, float]:
    """Draw digits of each label, `rows` times. Writes digits.png: a column per label, from 0 to 9."""
    model = load_pretrained(stage.inputs["train"].fetch("model")).eval()
    labels = torch.arange(NUM_SHADES, EOD).repeat(stage.args["rows"])
    prompt_bt = torch.stack((torch.full_like(labels, EOD), labels), dim=1)
    drawn = generate(model, prompt_bt, max_new_tokens=SIDE * SIDE, num_token_ids=NUM_SHADES)
    pixels_bt = torch.stack(list(drawn), dim=1)
    grid = pixels_bt.view(stage.args["rows"], NUM_LABELS, SIDE, SIDE).transpose(1, 2).flatten(2).flatten(0, 1)
    image.imsave(stage.folder / "digits.png", grid.numpy(), cmap="gray_r", vmin=0, vmax=NUM_SHADES - 1)
    return {"digits/mean_shade": float(pixels_bt.float().mean())}


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    np.save("runs/digits.npy", ids_of_digits())
