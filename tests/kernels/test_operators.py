"""Every path of every operator against its reference, from the declarations; and what an operator records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.operator import OPERATORS, Operator, ran, use
from kernels.overview import load_all, planned
from kernels.pointwise import rms_norm

load_all()


def paths() -> Iterator[tuple[str, str, torch.dtype]]:
    for name, operator in OPERATORS.items():
        if operator.path("reference") is not None:
            for path in ("torch", "cpp", "triton", "static"):
                for dtype in () if operator.path(path) is None else operator.path(path).tolerance:
                    yield name, path, dtype


def example(operator: Operator[..., Any, Any], dtype: torch.dtype) -> Any:
    """The declared example; in 16 bits its numbers are rounded, and shared with the reference."""
    inputs = operator.example()
    return type(inputs)(*(_converted(x, dtype) for x in inputs))


def _converted(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple) and x and isinstance(x[0], Tensor):
        return tuple(_converted(part, dtype) for part in x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype, copy=True).requires_grad_()


def outputs_and_gradients(operator: Operator[..., Any, Any], path: str, inputs: Any) -> list[Tensor]:
    """Outputs, gradients of the inputs that have one, and inputs that were updated in place."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    with use(path):
        outputs = operator(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    differentiable = [x for x in outputs if x.grad_fn is not None]
    if not differentiable:
        return [*outputs, *leaves]
    grads = torch.autograd.grad(differentiable, leaves, [x.detach().cos() for x in differentiable], allow_unused=True)
    return [*outputs, *(torch.zeros(()) if grad is None else grad for grad in grads)]


@pytest.mark.parametrize(("name", "path", "dtype"), list(paths()), ids=str)
def test_every_path_agrees_with_the_reference(name, path, dtype):
    operator = OPERATORS[name]
    inputs = example(operator, dtype)
    exact = type(inputs)(*(_converted(x, torch.float64) for x in inputs))
    with use(path):
        choice = operator.choose(*inputs)
    if choice.path != path:
        pytest.skip(choice.reason)
    # Not for what works in place; nor in 16 bits, where a gradient may be a sum of rounded numbers of both signs.
    with torch.set_grad_enabled(dtype.itemsize > 2 and not name.endswith("_")):
        got, want = (outputs_and_gradients(operator, p, x) for p, x in ((path, inputs), ("reference", exact)))
    sums = 4e-5 if dtype == torch.float32 else 0.0  # a parameter's gradient in float32 sums over all positions
    for value, expected in zip(got, want, strict=True):
        tolerance = max(operator.path(path).tolerance[dtype], sums if value.grad_fn is None and len(got) > 1 else 0.0)
        assert (value.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_a_choice_is_recorded_and_logged_once(caplog):
    rms_norm.ran.clear()
    x, weight = torch.ones(2, 4), torch.ones(4)
    with caplog.at_level(logging.INFO, "kernels.operator"):
        for _ in range(2):
            rms_norm(x, weight, 1e-5)
            rms_norm(x.bfloat16(), weight, 1e-5)
    assert [record.message for record in caplog.records] == [
        "rms_norm runs on cpp: float32 or float64 on the CPU",
        "rms_norm runs on torch: torch.bfloat16 on the CPU",
    ]
    assert [choice[1:] for choice in ran() if choice.operator == "rms_norm"] == [
        ("cpp", "float32 or float64 on the CPU"),
        ("torch", "torch.bfloat16 on the CPU"),
    ]


def test_every_operator_can_say_what_it_would_run_on():
    assert {choice.operator for choice in planned(torch.device("cpu"))} == set(OPERATORS)


def test_an_operator_shows_the_signature_and_text_of_its_inputs():
    assert "arXiv:1910.07467" in rms_norm.__doc__
    assert list(rms_norm.__signature__.parameters) == ["x", "weight", "eps", "dtype"]
