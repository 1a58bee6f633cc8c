"""A seam for AWS's NKI kernel of the SSD scan (nki-library, experimental/scan). Nothing here ever ran on a NeuronCore.

Off unless BMOJO_KERNELS=nki asks for it. The kernel is forward only; the backward is that of the static path, which is
computed again. What the kernel's own tests do not cover is refused.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels.operator import Path
from kernels.ssd_scan import static_path
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs

KERNEL = "nkilib.experimental.scan.ssd"
CHUNKS = (128, 64)  # positions that a kernel takes at once, the preferred number first
MAX_STATE = 128
IS_INSTALLED = importlib.util.find_spec("nkilib") is not None


def _kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In the kernel's layouts: time behind heads, states ahead of channels, one group of B and C, all in float32."""
    ssd = importlib.import_module(KERNEL).ssd
    chunk = _chunk(x.shape[1])
    state_bhnp = None if initial is None else initial.float().transpose(2, 3).contiguous()
    y_bhtp, state_bhnp = ssd(
        x.float().transpose(1, 2).contiguous(),
        dt.float().transpose(1, 2).contiguous(),
        A.float(),
        B.float()[:, :, 0].contiguous(),
        C.float()[:, :, 0].contiguous(),
        chunk_size=chunk,
        D=D.float(),
        initial_state=state_bhnp,
        causal_mask=torch.ones(chunk, chunk, device=x.device).tril(),
    )
    return y_bhtp.transpose(1, 2).contiguous().to(x.dtype), state_bhnp.transpose(2, 3).contiguous()


_op = torch.library.custom_op(
    "bmojo::ssd_scan_nki",
    _kernel,
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? initial) -> (Tensor, Tensor)",
)


@_op.register_fake
def _empty(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, _, h, p = x.shape
    return x.new_empty(x.shape), x.new_empty(b, h, p, B.shape[3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Of the static path on the same inputs."""
    given: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        outputs = static_path.ssd_scan.run(ScanInputs(*given))
    found = iter(torch.autograd.grad(outputs, [x for x in given if x is not None], grads))
    return tuple(None if x is None else next(found) for x in given)


_op.register_autograd(_backward, setup_context=_save)


def _run(inputs: ScanInputs) -> ScanOutputs:
    return ScanOutputs(*_op(*inputs[:7]))


def _chunk(t: int) -> int:
    return next((size for size in CHUNKS if t % size == 0), 0)


def _refuses(inputs: ScanInputs) -> str | None:
    if not IS_INSTALLED:
        return "nki-library is not installed"
    if inputs.doc_ids_bt is not None:
        return "the NKI scan knows no documents"
    if inputs.B_btgn.shape[2] != 1:
        return f"the NKI scan takes one group of B and C, not {inputs.B_btgn.shape[2]}"
    if inputs.B_btgn.shape[3] > MAX_STATE:
        return f"the NKI scan takes d_state up to {MAX_STATE}, not {inputs.B_btgn.shape[3]}"
    if not _chunk(inputs.x_bthp.shape[1]):
        return f"the NKI scan takes a multiple of {min(CHUNKS)} positions, not {inputs.x_bthp.shape[1]}"
    if inputs.x_bthp.dtype == torch.float64:
        return "the NKI scan is in float32"
    return None


ssd_scan = Path(_run, _refuses)
