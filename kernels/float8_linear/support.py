"""What float8 products ask of a device and of shapes."""

from __future__ import annotations

import torch

ALIGNED = 16  # elements that rows of both operands are a multiple of
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def device_refuses(device: torch.device) -> str | None:
    """The reason why float8 products cannot run there; None if they can."""
    if device.type != "cuda":
        return f"float8 products need an NVIDIA GPU, and tensors are on {device.type!r}"
    if torch.version.hip:
        return "float8 products are for NVIDIA GPUs: AMD's float8 has other formats"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return (
            f"float8 products need compute capability {'.'.join(map(str, CAPABILITY))} (Ada, Hopper or newer), and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}"
        )
    return None
