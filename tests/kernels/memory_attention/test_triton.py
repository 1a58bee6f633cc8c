"""Memory attention's Triton kernels in the interpreter: outputs and every gradient against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.gpu.tuning import INTERPRETER
from kernels.memory_attention import (
    Eidetic,
    KeysValues,
    Slots,
    memory_attention,
    memory_attention_step,
    triton_path,
    triton_plan,
)
from kernels.operator import use

pytestmark = pytest.mark.usefixtures("nan_memory")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value: see the README


@dataclass(frozen=True)
class Case:
    """Sizes of a call; no fading memory if `fading` is false, no eidetic set if m is 0; lengths of packed documents."""

    t: int
    w: int
    c: int = 5
    m: int = 0
    h: int = 2
    kv_heads: int = 1
    p: int = 16
    fading: bool = True
    documents: bool = False
    num_past: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = ()

    def inputs(self) -> list[Tensor]:
        """q, k, v, then fading k, v, then eidetic q, k; the slots read the window's values, as in the model."""
        generator = torch.Generator().manual_seed(self.t)

        def normal(rows: int, heads: int) -> Tensor:
            x = torch.randn(self.batch, rows, heads, self.p, generator=generator, dtype=torch.float64)
            return x.to(self.dtype).double()

        rows = self.t + self.num_past
        x = [normal(self.t, self.h), normal(rows, self.kv_heads), normal(rows, self.kv_heads)]
        fading_rows = max(rows + self.num_past - self.w, 1)
        x += [normal(fading_rows, self.kv_heads) for _ in range(2)] if self.fading else []
        return x + ([normal(self.t, self.h), normal(rows, self.kv_heads)] if self.m else [])

    def index(self) -> Tensor:
        """Rows that differ within a chunk and recur in others; about a third of the slots are empty."""
        generator = torch.Generator().manual_seed(self.m)
        shape = self.batch * -(-self.t // self.c)
        candidates = max(self.t + self.num_past, self.m) * 3 // 2
        index = torch.stack([torch.randperm(candidates, generator=generator)[: self.m] for _ in range(shape)])
        return torch.where(index < self.t + self.num_past, index, -1).view(self.batch, -1, self.m)

    def doc_ids(self) -> Tensor | None:
        if self.lengths:
            return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).expand(self.batch, -1)
        starts = torch.rand(self.batch, self.t, generator=torch.Generator().manual_seed(1)) < 0.15
        return starts.cumsum(1) if self.documents else None

    def results(self, path: str, dtype: torch.dtype) -> list[Tensor]:
        """Output and every gradient."""
        leaves = [x.to(dtype).requires_grad_() for x in self.inputs()]
        q, k, v, *others = leaves
        with use(path):
            out = memory_attention(
                q, k, v, KeysValues(others[0], others[1]) if self.fading else None,
                Eidetic(others[-2], others[-1], v, self.index()) if self.m else None,
                window_size=self.w, chunk_size=self.c, doc_ids_bt=self.doc_ids(), num_past=self.num_past,
            )  # fmt: skip
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(self.dtype).to(dtype))]


def assert_matches_reference(case: Case) -> None:
    wanted, found = case.results("reference", torch.float64), case.results("triton", case.dtype)
    for want, got in zip(wanted, found, strict=True):
        assert got.dtype == case.dtype
        assert (got - want).abs().max() <= TOLERANCE[case.dtype] * max(1.0, want.abs().max().item())


THREE_SETS = Case(t=23, w=6, c=7, m=3, batch=2)


@pytest.mark.parametrize(
    "case",
    [
        THREE_SETS,
        replace(THREE_SETS, documents=True),
        replace(THREE_SETS, num_past=9),
        replace(THREE_SETS, h=6, kv_heads=2, batch=1),  # a group of 3 does not divide a tile
        replace(THREE_SETS, p=6),  # padded to 16
        replace(THREE_SETS, p=64, batch=1),
        Case(t=1, w=3, c=2, m=2),
        Case(t=1, w=3, m=2, num_past=5),
        Case(t=30, w=4, c=30, m=18, h=1),  # more slots than a tile holds
        Case(t=70, w=40, c=40, m=4, h=1),  # windows wide enough for tiles that need no mask
        Case(t=40, w=20, h=4, kv_heads=4, batch=1),
        Case(t=50, w=50, fading=False),
        Case(t=33, w=1000, fading=False, documents=True),
        Case(t=20, w=11, fading=False, num_past=30),
        Case(t=20, w=11, fading=False, c=8, m=5),
        Case(t=23, w=6, c=7, m=3, h=3, kv_heads=1, documents=True),
        Case(t=23, w=6, c=7, h=4, kv_heads=2, num_past=9),
        # Documents longer than both memories, so that some tiles need no mask, and shorter than a tile
        Case(t=100, w=33, c=50, m=4, h=1, lengths=(3, 70, 1, 2, 24)),
        Case(t=90, w=20, c=33, h=2, lengths=(90,)),
        Case(t=90, w=64, fading=False, h=1, lengths=(48, 42)),
    ],
    ids=repr,
)
def test_output_and_gradients_match_the_reference(case):
    assert_matches_reference(case)


@pytest.mark.ci
@pytest.mark.parametrize("by_descriptor", [False, True])
@pytest.mark.parametrize("case", [replace(THREE_SETS, num_past=9), Case(t=70, w=33, c=40, m=4, h=2, lengths=(50, 20))])
def test_each_way_to_load_matches_the_reference(monkeypatch, case, by_descriptor):
    monkeypatch.setattr(triton_plan, "WITHOUT_COPY_ENGINE", () if by_descriptor else (INTERPRETER,))
    assert_matches_reference(case)


def test_documents_may_come_again():
    """Nothing says that a document's positions are adjacent: the ids are compared, not their order."""
    docs = torch.tensor([0, 5, 5, 1]).repeat_interleave(torch.tensor([20, 7, 20, 13]))
    docs[30:] = docs[:30].flip(0)
    case = Case(t=60, w=25, c=16, m=3, h=1)
    q, k, v, fk, fv, far_q, raw_k = (x.float() for x in case.inputs())
    results = []
    for path in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, fk, fv, far_q, raw_k)]
        with use(path):
            out = memory_attention(
                *leaves[:3], KeysValues(*leaves[3:5]), Eidetic(*leaves[5:], leaves[2], case.index()),
                window_size=25, chunk_size=16, doc_ids_bt=docs[None],
            )  # fmt: skip
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())


def test_tensors_that_no_tile_can_be_taken_of_are_copied():
    """Rows that begin off a boundary of 16 bytes, and heads that lie further apart than their channels."""
    q, k, v = (x.float() for x in Case(t=19, w=5, fading=False).inputs())
    want = memory_attention(q, k, v, window_size=5)
    odd = torch.randn(1, 19, 1, 17)[..., 1:].copy_(v)
    assert not triton_plan.is_tileable(odd)
    with use("triton"):
        got = memory_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, odd, window_size=5)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
def test_lower_precision_matches_the_reference(dtype, documents):
    assert_matches_reference(Case(t=20, w=6, c=7, m=3, dtype=dtype, documents=documents))


def test_another_documents_keys_change_no_bit():
    case = Case(t=24, w=24, c=8, m=4, batch=1)
    q, k, v, fk, fv, far_q, raw_k = (x.float() for x in case.inputs())
    docs = (torch.arange(24) >= 16).long()[None]
    index = torch.tensor([0, 3, -1, 5]).expand(1, 3, 4).clone()
    index[:, 2] = -1

    def attend(k: Tensor, v: Tensor) -> Tensor:
        with use("triton"):
            fading, eidetic = KeysValues(fk, fv), Eidetic(far_q, raw_k, v, index)
            return memory_attention(q, k, v, fading, eidetic, window_size=24, chunk_size=8, doc_ids_bt=docs)

    other_k, other_v = k.clone(), v.clone()
    other_k[:, :16], other_v[:, :16] = 1e30, 1e30
    assert attend(k, v)[:, 16:].equal(attend(other_k, other_v)[:, 16:])


def test_gradients_are_the_same_bits_in_every_run():
    case = replace(THREE_SETS, m=5, batch=1)
    first, second = (case.results("triton", torch.float32) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_inputs_may_be_views_and_gradients_expanded():
    joined = torch.randn(2, 17, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grads = []
    for path in ("torch", "triton"):
        k, v = joined.chunk(2, -1)
        with use(path):
            out = memory_attention(k.transpose(-1, -2).contiguous().transpose(-1, -2), k, v, window_size=5)
        grads.append(torch.autograd.grad(out.sum(), joined)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=2e-5)


def test_registered_operators_pass_opcheck():
    case = Case(t=5, w=2, c=4, m=2, h=1)
    q, k, v, fk, fv, far_q, raw_k = (x.float().requires_grad_() for x in case.inputs())
    args = (q, k, v, fk, fv, far_q, raw_k, v, case.index(), None, 2, 4, 0, 0.25)
    torch.library.opcheck(triton_path.attend, args)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    out, lse = triton_path.attend(*plain)
    torch.library.opcheck(torch.ops.bmojo.memory_attention_backward.default, (*plain, out, lse, out))


def test_compiles_whole():
    q, k, v = (x.float().requires_grad_() for x in Case(t=9, w=3, fading=False).inputs())
    with use("triton"):
        want = memory_attention(q, k, v, window_size=3)
        compiled = torch.compile(lambda q, k, v: memory_attention(q, k, v, window_size=3), backend="aot_eager")
        got = compiled(q, k, v)
    assert got.equal(want)
    got.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "kv_heads", "dtype", "message"),
    [
        ((1, 2, 2, 257), 2, torch.float32, "head_dim up to 256, not 257"),
        ((1, 2, 2, 16), 2, torch.float64, "bfloat16, float16 or float32, one for all inputs, not float64"),
        ((1, 2, 130, 16), 2, torch.float32, r"up to \d+ query heads per key/value head, not 65"),
    ],
)
def test_limits_are_named(shape, kv_heads, dtype, message):
    q = torch.zeros(shape, dtype=dtype)
    k = q[:, :, :kv_heads]
    with use("triton"), pytest.raises(ValueError, match=message):
        memory_attention(q, k, k, window_size=1)


def test_mixed_dtypes_are_refused():
    q = torch.zeros(1, 2, 2, 16)
    with use("triton"), pytest.raises(ValueError, match="not bfloat16 and float32"):
        memory_attention(q, q.bfloat16(), q, window_size=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("w", "c", "m", "p", "h"), [(20, 8, 18, 16, 2), (7, 3, 3, 6, 6), (5, 2, 0, 32, 2)])
@pytest.mark.parametrize("positions", [(0, 4), (13, 131)])
def test_step_matches_plain_torch(w, c, m, p, h, positions, dtype):
    generator = torch.Generator().manual_seed(w)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, p, generator=generator).to(dtype)

    window, fading = (normal(h), normal(w + c, 2), normal(w + c, 2)), KeysValues(normal(2 * w, 2), normal(2 * w, 2))
    slots = torch.randint(-1, 2, (2, m), generator=generator)
    eidetic = Slots(normal(h), normal(m, 2), normal(m, 2), slots) if m else None
    position_b = torch.tensor(positions)
    for others in ((fading, eidetic), (None, None)):
        results = []
        for path in ("torch", "triton"):
            with use(path):
                results.append(memory_attention_step(*window, position_b, *others, window_size=w))
        assert (results[1] - results[0]).abs().max() <= TOLERANCE[dtype]


def test_step_of_a_cache_that_is_not_full_reads_what_is_written():
    q, k = torch.randn(1, 2, 16), torch.full((1, 64, 1, 16), torch.nan)
    k[:, :21] = torch.randn(1, 21, 1, 16)
    with use("triton"):
        out = memory_attention_step(q, k, k, torch.tensor([20]), window_size=64)
    with use("reference"):
        want = memory_attention(q[:, None], k[:, :21], k[:, :21], window_size=21, num_past=20)[:, 0]
    torch.testing.assert_close(out, want)


def test_step_passes_opcheck():
    q, k = torch.randn(1, 2, 16), torch.randn(1, 6, 1, 16)
    args = (q, k, k, None, None, None, None, None, None, torch.tensor([4]), 3, 0.25)
    torch.library.opcheck(triton_path.step, args)
