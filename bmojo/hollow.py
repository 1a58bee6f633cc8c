"""Models whose parameters take no memory until their values are set, part by part, for those no process holds whole.

Each `fill_...` yields the parts of a hollow model in turn, each when its values are set. Whoever reads them may take
the values out of a part before it asks for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from bmojo.config import ModelConfig
from bmojo.model import BMojoLM


def hollow_model(config: ModelConfig) -> BMojoLM:
    """A model on the CPU whose parameters have shapes, but neither values nor memory."""
    with torch.device("meta"):
        model = BMojoLM(config)
    hollow: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in hollow:
                hollow[parameter] = nn.Parameter(_nothing(parameter.shape))
            setattr(module, name, hollow[parameter])
    return model


def fill_empty(model: BMojoLM) -> Iterator[nn.Module]:
    """Memory with whatever is in it."""
    for part in _parts(model):
        _allocate(part.parameters())
        yield part


def fill_initial(model: BMojoLM, seed: int) -> Iterator[nn.Module]:
    """The values of init_weights(seed), to the last bit.

    Random numbers are drawn in another order than that of the parts. So all are drawn once before, to know the
    generator's state at each draw.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for module, draw in model.draws():
        parameters = list(module.parameters())
        _allocate(parameters)
        draws.append((module, draw, generator.get_state()))
        draw(generator)
        for parameter in parameters:
            parameter.data = _nothing(parameter.shape)
    for part in fill_empty(model):
        inside = set(part.modules())
        for module, draw, state in draws:
            if module in inside:
                generator.set_state(state)
                draw(generator)
        yield part


def fill_from(model: BMojoLM, read: Callable[[str], torch.Tensor]) -> Iterator[nn.Module]:
    """The values that `read` gives by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for part in fill_empty(model):
        with torch.no_grad():
            for parameter in part.parameters():
                if parameter.numel():  # not tied to one that was taken out
                    parameter.copy_(read(names[parameter]))
        yield part


def _parts(model: BMojoLM) -> list[nn.Module]:
    return [model.embedding, *model.blocks, model.norm, model.head]


def _nothing(shape: torch.Size) -> torch.Tensor:
    return torch.empty(()).expand(shape)


def _allocate(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.untyped_storage().nbytes() < parameter.numel() * parameter.element_size():
            parameter.data = torch.empty(parameter.shape)
