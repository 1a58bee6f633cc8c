"""Random generator states as tensors, so that a checkpoint holds no pickle."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's, torch's and, where `device` is not the CPU, the device's generators."""
    _, python_words, python_gauss = random.getstate()
    _, numpy_keys, numpy_position, has_gauss, numpy_gauss = np.random.get_state()
    states = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(numpy_keys, dtype=np.int64)),
        "numpy_position": torch.tensor([numpy_position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `capture` took."""
    has_gauss, gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss if has_gauss else None))
    position, numpy_has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, numpy_has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
