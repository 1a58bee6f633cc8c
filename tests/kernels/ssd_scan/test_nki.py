"""The seam for the NKI scan, with a stand-in for AWS's kernel: layouts, gradients, refusals. The kernel never ran."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.operator import use
from kernels.ssd_scan import nki_path, reference, ssd_scan
from kernels.ssd_scan.reference import ScanInputs
from tests.kernels.helpers import TOLERANCE, assert_close, documents
from tests.kernels.ssd_scan.scans import ScanSize, run_scan, scan_inputs


def stand_in(
    x_bhtp: Tensor, dt_bht: Tensor, A_h: Tensor, B_btn: Tensor, C_btn: Tensor, *, chunk_size: int, D: Tensor,
    initial_state: Tensor | None, causal_mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In the layouts that nki-library documents, by the reference."""
    assert x_bhtp.shape[2] % chunk_size == 0
    assert causal_mask.shape == (chunk_size, chunk_size)
    initial = None if initial_state is None else initial_state.transpose(2, 3)
    x_bthp, dt_bth = x_bhtp.transpose(1, 2), dt_bht.transpose(1, 2)
    y, state = reference.ssd_scan.run(ScanInputs(x_bthp, dt_bth, A_h, B_btn[:, :, None], C_btn[:, :, None], D, initial))
    return y.transpose(1, 2), state.transpose(2, 3)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nki_path, "IS_INSTALLED", True)
    monkeypatch.setitem(sys.modules, nki_path.KERNEL, SimpleNamespace(ssd=stand_in))


@pytest.mark.parametrize("with_initial", [False, True])
def test_the_kernels_layouts_and_our_backward_are_the_reference(installed, with_initial):
    inputs = scan_inputs(ScanSize(64, 3, 1, 4, 5), with_initial=with_initial)
    with use("nki"):
        assert ssd_scan.choose(*inputs).path == "nki"
    assert_close(run_scan("nki", inputs), run_scan("reference", inputs, None, torch.float64), TOLERANCE)


@pytest.mark.ci
def test_it_is_one_node_of_a_compiled_graph_and_so_differentiable(installed):
    inputs = scan_inputs(ScanSize(64, 2, 1, 4, 5), with_initial=False)[:6]
    leaves = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    with use("nki"):
        grads = [torch.autograd.grad(call(*leaves).y_bthp.cos().sum(), leaves) for call in (ssd_scan, compiled)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (ScanSize(64, 2, 2, 4, 5), "one group of B and C, not 2"),
        (ScanSize(64, 2, 1, 4, 130), "d_state up to 128, not 130"),
        (ScanSize(65, 2, 1, 4, 5), "a multiple of 64 positions, not 65"),
    ],
)
def test_what_the_kernel_cannot_do_is_static(installed, size, reason):
    assert_static(reason, *scan_inputs(size))


def test_documents_are_static_and_so_is_everything_without_the_library(installed, monkeypatch):
    inputs = scan_inputs(ScanSize(64, 2, 1, 4, 5))
    assert_static("knows no documents", *inputs, documents(2, 64))
    monkeypatch.setattr(nki_path, "IS_INSTALLED", False)
    assert_static("not installed", *inputs)


def assert_static(reason: str, *inputs: Any) -> None:
    with use("nki"):
        choice = ssd_scan.choose(*inputs)
    assert choice.path == "static"
    assert reason in choice.reason
