"""A whole training step of tensors without memory on a device named `neuron`: forward, backward, clipping, AdamW.

It stops at a tensor that is on another device, at a number that the host waits for (`.item()`) and at a shape that the
values decide (a boolean index). As a program: `python -m pipelines.neuron.checks.fake_step MODEL.json SEQ_LEN BATCH`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo import BMojoLM, ModelConfig
from kernels.operator import NEURON
from pipelines.neuron.checks.registration import register

CAUGHT = (RuntimeError, ValueError, AssertionError, NotImplementedError)
"""What FakeTensorMode raises: its own errors are subclasses of these."""


def fake_step(config: ModelConfig, seq_len: int, batch: int, documents: bool = True) -> Tensor:
    """The loss of a step in bf16. Call `register` first.

    Raises: an error of CAUGHT: something in the step is not static, or not on the device.
    """
    with torch.device("meta"):
        model = BMojoLM(config)
    with FakeTensorMode():
        put_on(model, torch.device(NEURON))
        tokens_bt = torch.zeros(batch, seq_len, dtype=torch.int64, device=NEURON)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with torch.autocast(NEURON, dtype=torch.bfloat16):
            loss = model(tokens_bt, tokens_bt, tokens_bt if documents else None).loss
        assert loss is not None
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss


def put_on(model: nn.Module, device: torch.device) -> None:
    """Parameters without values there, in the place of those of a model on the meta device; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
            setattr(module, name, made[parameter])


def main(arguments: list[str]) -> int:
    """Print what the step came to; 1 if it stopped."""
    path, seq_len, batch = arguments
    config = ModelConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    register()
    try:
        loss = fake_step(config, int(seq_len), int(batch))
    except CAUGHT as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    print(f"loss on {loss.device}, {loss.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
