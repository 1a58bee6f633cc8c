"""The SSD scan and its decoding step on Triton: limits, and registration with torch.library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch import Launch
from kernels.ssd_scan.triton_plan import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    Inputs,
    candidates,
    plan_backward,
    plan_forward,
    plan_step,
    representative_inputs,
)
from kernels.tuning import architecture, choose, require

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM, MAX_D_STATE = 128, 256


def ssd_scan_triton(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.ssd_scan. x, B and C may be parts of a wider projection; other layouts are copied.

    Raises: ValueError: see check_limits.
    """
    check_limits(x_bthp, B_btgn, C_btgn)
    initial = None if initial_bhpn is None else initial_bhpn.float()
    return ssd_scan_op(x_bthp, dt_bth.float(), A_h.float(), B_btgn, C_btgn, D_h.float(), initial, doc_ids_bt)


def ssd_step_triton(
    x_bhp: Tensor, dt_bh: Tensor, A_h: Tensor, B_bgn: Tensor, C_bgn: Tensor, D_h: Tensor, state_bhpn: Tensor
) -> Tensor:
    """See kernels.ssd_scan.ssd_step. Raises: ValueError: see check_limits; the state is not contiguous float32."""
    check_limits(x_bhp, B_bgn, C_bgn)
    require(
        state_bhpn.dtype == torch.float32 and state_bhpn.is_contiguous(),
        f"ssd_step in Triton updates a contiguous float32 state in place, not {state_bhpn.dtype} with strides "
        f"{state_bhpn.stride()}; copy it once before decoding, or use BMOJO_KERNELS=torch.",
    )
    return ssd_step_op(x_bhp, dt_bh.float(), A_h.float(), B_bgn, C_bgn, D_h.float(), state_bhpn)


def check_limits(x: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise ValueError where the kernels do not serve these dtypes or sizes."""
    require(
        x.dtype in DTYPES and x.dtype == B.dtype == C.dtype,
        f"ssd_scan in Triton takes x, B and C of one dtype among bfloat16, float16 and float32, not {x.dtype}, "
        f"{B.dtype} and {C.dtype}; cast them, or use BMOJO_KERNELS=torch.",
    )
    for name, size, limit in (("head_dim", x.shape[-1], MAX_HEAD_DIM), ("d_state", B.shape[-1], MAX_D_STATE)):
        require(
            size <= limit,
            f"ssd_scan in Triton takes {name} up to {limit}, not {size}; use a smaller one, or BMOJO_KERNELS=torch.",
        )


@torch.library.custom_op("bmojo::ssd_scan", mutates_args=())
def ssd_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = _laid_out(Inputs(x, dt, A, B, C, D, initial, doc_ids))
    arch = architecture(x.device)
    config = choose(
        "ssd_scan_forward",
        arch,
        candidates(FORWARD_CONFIGS, arch, x.dtype),
        _key(inputs),
        lambda config: plan_forward(inputs, config).launches,
    )
    launches, (y, final) = plan_forward(inputs, config)
    _run(launches)
    return y, final


@torch.library.custom_op("bmojo::ssd_scan_backward", mutates_args=())
def ssd_scan_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _laid_out(Inputs(x, dt, A, B, C, D, initial, doc_ids))
    cotangents = _dense_rows(dy), _contiguous(dfinal)
    arch = architecture(x.device)
    config = choose(
        "ssd_scan_backward",
        arch,
        candidates(BACKWARD_CONFIGS, arch, x.dtype),
        _key(inputs),
        lambda config: plan_backward(*cotangents, inputs, config).launches,
    )
    launches, (dx, ddt, dA, dB, dC, dD, dinitial) = plan_backward(*cotangents, inputs, config)
    _run(launches)
    return dx, ddt, dA.sum((0, 1)), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum((0, 1)), dinitial


@torch.library.custom_op("bmojo::ssd_step", mutates_args=("state",))
def ssd_step_op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    launch, y = plan_step(
        x.contiguous(), dt.contiguous(), A.contiguous(), B.contiguous(), C.contiguous(), D.contiguous(), state
    )
    _run([launch])
    return y


@ssd_scan_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, _, h, p = x.shape
    return x.new_empty(x.shape), dt.new_empty(b, h, p, B.shape[3])


@ssd_scan_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    b, _, h, p = x.shape
    return *(m.new_empty(m.shape) for m in (x, dt, A, B, C, D)), dt.new_empty(b, h, p, B.shape[3])


@ssd_step_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = Inputs(*ctx.saved_tensors)
    *grads, dinitial = ssd_scan_backward_op(dy, dfinal, *inputs)
    return *grads, None if inputs.initial is None else dinitial, None


ssd_scan_op.register_autograd(_gradients, setup_context=_save_inputs)


def _laid_out(inputs: Inputs) -> Inputs:
    x, dt, A, B, C, D, initial, doc_ids = inputs
    return Inputs(
        _dense_rows(x),
        dt.contiguous(),
        A.contiguous(),
        _dense_rows(B),
        _dense_rows(C),
        D.contiguous(),
        _contiguous(initial),
        _contiguous(doc_ids),
    )


def _dense_rows(x: Tensor) -> Tensor:
    """x itself where its last two axes lie densely, as they do in parts of a wider projection; else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _key(inputs: Inputs) -> tuple[object, ...]:
    return inputs.x.dtype, *inputs.x.shape, *inputs.B.shape[2:]


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """The launches at the representative sizes, for `make kernel-report`."""
    forward, backward = FORWARD_CONFIGS[arch][0], BACKWARD_CONFIGS[arch][0]
    cases = []
    for d_state, packed in ((64, False), (128, True)):
        inputs = representative_inputs(d_state, packed)
        x, dt, A, B, C, D = inputs[:6]
        state = dt.new_empty(*x.shape[:1], *x.shape[2:], d_state)
        dfinal = state if packed else None
        cases.append((f"forward, d_state {d_state}", plan_forward(inputs, forward).launches))
        cases.append((f"backward, d_state {d_state}", plan_backward(x, dfinal, inputs, backward).launches))
        cases.append((f"step, d_state {d_state}", [plan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)[0]]))
    return cases
