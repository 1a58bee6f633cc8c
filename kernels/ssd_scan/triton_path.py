"""The SSD scan and its decoding step in Triton: limits, and the launches of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.launch import Launch
from kernels.gpu.tuning import architecture, choose
from kernels.operator import Path, library_op
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs, StepInputs
from kernels.ssd_scan.triton_plan import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    candidates,
    plan_backward,
    plan_forward,
    representative_inputs,
)
from kernels.ssd_scan.triton_step import plan_step, step_case

# bfloat16: the interpreter cuts float32 to it (up to 2^-7), where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MAX_HEAD_DIM, MAX_D_STATE = 128, 256


def _refuses(inputs: ScanInputs) -> str | None:
    return _limit(inputs.x_bthp, inputs.B_btgn, inputs.C_btgn)


def _step_refuses(inputs: StepInputs) -> str | None:
    state = inputs.state_bhpn
    if state.dtype != torch.float32 or not state.is_contiguous():
        return (
            f"ssd_step in Triton updates a contiguous float32 state in place, not {state.dtype} with strides "
            f"{state.stride()}; copy it once before decoding, or use BMOJO_KERNELS=torch."
        )
    return _limit(inputs.x_bhp, inputs.B_bgn, inputs.C_bgn)


def _limit(x: Tensor, B: Tensor, C: Tensor) -> str | None:
    """The limit that these dtypes or sizes exceed."""
    if not (x.dtype in TOLERANCE and x.dtype == B.dtype == C.dtype):
        return (
            f"ssd_scan in Triton takes x, B and C of one dtype among bfloat16, float16 and float32, not {x.dtype}, "
            f"{B.dtype} and {C.dtype}; cast them, or use BMOJO_KERNELS=torch."
        )
    for name, size, limit in (("head_dim", x.shape[-1], MAX_HEAD_DIM), ("d_state", B.shape[-1], MAX_D_STATE)):
        if size > limit:
            return (
                f"ssd_scan in Triton takes {name} up to {limit}, not {size}; use a smaller one, or BMOJO_KERNELS=torch."
            )
    return None


def _forward(inputs: ScanInputs) -> tuple[Tensor, ...]:
    laid_out = _laid_out(inputs)
    arch = architecture(inputs.x_bthp.device)
    config = choose(
        "ssd_scan_forward",
        arch,
        candidates(FORWARD_CONFIGS, arch, inputs.x_bthp.dtype),
        _key(inputs),
        lambda config: plan_forward(laid_out, config).launches,
    )
    launches, results = plan_forward(laid_out, config)
    _launch(launches)
    return results


def _empty_outputs(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    b, _, h, p = inputs.x_bthp.shape
    return inputs.x_bthp.new_empty(inputs.x_bthp.shape), inputs.dt_bth.new_empty(b, h, p, inputs.B_btgn.shape[3])


def _backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    laid_out = _laid_out(inputs)
    cotangents = _dense_rows(dy), _contiguous(dfinal)
    arch = architecture(dy.device)
    config = choose(
        "ssd_scan_backward",
        arch,
        candidates(BACKWARD_CONFIGS, arch, inputs.x_bthp.dtype),
        _key(inputs),
        lambda config: plan_backward(*cotangents, laid_out, config).launches,
    )
    launches, (dx, ddt, dA, dB, dC, dD, dinitial) = plan_backward(*cotangents, laid_out, config)
    _launch(launches)
    dB, dC = _sum(dB, inputs.B_btgn), _sum(dC, inputs.C_btgn)
    return dx, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), None if inputs.initial_bhpn is None else dinitial


def _sum(parts: Tensor, like: Tensor) -> Tensor:
    """Sum of parts along the first axis in the dtype of `like`, which a single part has."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(like.dtype)


def _step(inputs: StepInputs) -> Tensor:
    x, dt, dt_bias, A_log, B, C, D, state = inputs
    rates = _dense(dt), dt_bias.contiguous(), A_log.contiguous()
    launch, y = plan_step(StepInputs(_dense_heads(x), *rates, _dense_heads(B), _dense_heads(C), D, state))
    launch.run()
    return y


scan = library_op(
    "ssd_scan",
    ScanInputs,
    _forward,
    _empty_outputs,
    num_outputs=2,
    gradients=ScanInputs._fields[:-1],
    backward=_backward,
)
step = library_op(
    "ssd_step", StepInputs, _step, lambda inputs: inputs.x_bhp.new_empty(inputs.x_bhp.shape), mutates=("state_bhpn",)
)


def _run(inputs: ScanInputs) -> ScanOutputs:
    """x, B and C may be parts of a wider projection; other layouts are copied."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    initial = None if initial is None else initial.float()
    return ScanOutputs(*scan(x, dt.float(), A.float(), B, C, D.float(), initial, doc_ids))


def _run_step(inputs: StepInputs) -> Tensor:
    x, dt, dt_bias, A_log, B, C, D, state = inputs
    y_bhp: Tensor = step(x, dt, dt_bias.float(), A_log.float(), B, C, D.float().contiguous(), state)
    return y_bhp


ssd_scan = Path(_run, _refuses, TOLERANCE, strict=True)
ssd_step = Path(_run_step, _step_refuses, TOLERANCE, strict=True)


def _laid_out(inputs: ScanInputs) -> ScanInputs:
    x, dt, A, B, C, D, initial, doc_ids = inputs
    return ScanInputs(
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
    """x itself if its last two axes lie densely, as they do in parts of a wider projection; else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _dense_heads(x_bhp: Tensor) -> Tensor:
    """As _dense_rows, of one position."""
    return x_bhp if x_bhp.stride(2) == 1 and x_bhp.stride(1) == x_bhp.shape[2] else x_bhp.contiguous()


def _dense(x_bh: Tensor) -> Tensor:
    return x_bh if x_bh.stride(1) == 1 else x_bh.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _key(inputs: ScanInputs) -> tuple[object, ...]:
    return inputs.x_bthp.dtype, *inputs.x_bthp.shape, *inputs.B_btgn.shape[2:]


def _launch(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """The launches at the representative sizes, for `make kernel-report`."""
    forward, backward = FORWARD_CONFIGS[arch][0], BACKWARD_CONFIGS[arch][0]
    cases = []
    for d_state, packed in ((64, False), (128, True)):
        inputs = representative_inputs(d_state, packed)
        x, dt = inputs[:2]
        dfinal = dt.new_empty(*x.shape[:1], *x.shape[2:], d_state) if packed else None
        cases.append((f"forward, d_state {d_state}", plan_forward(inputs, forward).launches))
        cases.append((f"backward, d_state {d_state}", plan_backward(x, dfinal, inputs, backward).launches))
        cases.append(step_case(d_state))
    return cases
