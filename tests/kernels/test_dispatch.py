"""Selection of an operator's path."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import pointwise
from kernels.cpp import library
from kernels.operator import use


def path_of(x: torch.Tensor) -> str:
    return pointwise.gated_product.choose(x).path


def test_an_unknown_kernel_path_is_refused():
    message = "'fortran' does not exist; set BMOJO_KERNELS to one of reference, "
    with use("fortran"), pytest.raises(ValueError, match=message):
        path_of(torch.zeros(1))


def test_cpp_runs_on_cpu_unless_a_compiler_traces():
    assert library.is_available()
    assert path_of(torch.zeros(1)) == path_of(torch.zeros(1).double()) == "cpp"
    assert path_of(torch.zeros(1).bfloat16()) == path_of(torch.zeros(1, device="meta")) == "torch"
    paths = []
    torch.compile(lambda x: paths.append(path_of(x)) or x, backend="eager")(torch.zeros(1))
    assert paths == ["torch"]


def test_fake_tensors_subclasses_and_tracing_get_plain_torch():
    class Marked(torch.Tensor):
        pass

    with FakeTensorMode():
        fake = torch.zeros(2, 4)
        assert path_of(fake) == "torch"
    assert path_of(fake) == path_of(torch.zeros(1).as_subclass(Marked)) == "torch"
    with pytest.raises(TypeError, match="got a FakeTensor; set BMOJO_KERNELS=torch"):
        library.call("gated_product", torch.float32, fake)
    traced = torch.jit.trace(lambda x: pointwise.rms_norm(x, torch.ones(4), 1e-5), torch.ones(2, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(traced(x), pointwise.rms_norm(x, torch.ones(4), 1e-5))


def test_a_tensor_of_another_type_is_refused_before_its_memory_is_read():
    x = torch.zeros(3)
    with pytest.raises(TypeError, match=r"a C\+\+ kernel for torch.float32 on CPU got torch.float64 on cpu"):
        library.call("memory_attention_step", torch.float32, x.double())
