"""The parts of a model that a compiler for static graphs is given: the inside of every block, and the loss after them.

What is between them stays eager: the embedding, the rotary tables, and whatever hooks on a block gather its parameters.
Graphs are then small, and equal blocks share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch._dynamo

from bmojo.model import Block, BMojoLM, Compiled

GRAPHS_OF_A_BLOCK = 64
"""The most that are compiled: of each kind of layer, with gradients and without."""


def compile_parts(model: BMojoLM, compile: Callable[[Callable[..., Any]], Compiled]) -> None:
    """Let training and scoring run each part as `compile` returns it; decoding and inspection stay eager.

    Names of parameters do not change. Activation checkpointing of whole blocks calls the compiled ones again; that of
    mixers alone leaves blocks eager, because it is inside them.

    Args: compile: such as functools.partial(torch.compile, fullgraph=True, dynamic=False).
    """
    dynamo = torch._dynamo.config  # its limit is per function, and all blocks are of one
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS_OF_A_BLOCK)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compiled = compile(block.of_tensors)
    model.compiled_loss = compile(model.loss_of_stream)
