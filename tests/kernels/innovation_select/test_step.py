"""One decoding step of the eidetic memory, on every path, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.innovation_select import innovation_step, reference_step, triton_step
from kernels.innovation_select.reference_step import StepInputs
from kernels.operator import use
from tests.kernels.helpers import normal, pairwise

PATHS = ("torch", "cpp", "triton")
STATE = StepInputs._fields[3:11]


def results(path: str, inputs: StepInputs) -> dict[str, Tensor]:
    """The scores and the state afterwards, without what empty slots hold, which nobody reads."""
    given = inputs._replace(**{name: getattr(inputs, name).clone() for name in STATE})
    with use(path):
        score = reference_step.innovation_step.run(given) if path == "reference" else innovation_step(*given)
    found = {"score": score, **{name: getattr(given, name) for name in STATE}}
    empty = given.slot_position_bm < 0
    for name in ("slot_k_bmhp", "slot_v_bmhp", "slot_log_e_bm"):
        found[name] = found[name].masked_fill(empty.view(*empty.shape, *[1] * (found[name].dim() - 2)), 0)
    return found


def assert_defined(path: str, inputs: StepInputs) -> None:
    got, want = results(path, inputs), results("reference", inputs)
    for name, value in got.items():
        assert value.dtype == want[name].dtype, name
        torch.testing.assert_close(value, want[name], rtol=2e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("positions", "num_slots", "tau", "with_given"),
    pairwise([[16, 17], [3, 0], [4, 8], [160, 161], [9]], [1, 3, 5, 70], [None, 7.3], [False, True]),
)
def test_a_step_is_the_definition(path, positions, num_slots, tau, with_given):
    """70 slots are copied in two parts."""
    assert_defined(path, reference_step.made(positions, (5, 4), (2, 4), num_slots, with_given=with_given, tau=tau))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tau", [None, 8.0])
def test_ties_go_to_what_was_kept_and_then_to_the_earlier_position(path, tau):
    inputs = reference_step.made([160], (5, 4), (2, 4), 6, with_given=True, tau=tau)
    position = torch.arange(152, 160)  # what may enter, and what is in the window still
    falling = 0.0 if tau is None else -position / tau  # all rank alike, and 1 / 8 is exact
    inputs.log_e_br[0, position % 9] = torch.zeros(8) + falling
    inputs.slot_position_bm[0] = torch.tensor([3, 20, 100, -1, -1, -1])
    inputs.slot_log_e_bm[0] = 0.0 if tau is None else -inputs.slot_position_bm[0] / tau
    assert results(path, inputs)["slot_position_bm"].tolist() == [[3, 20, 100, 152, 153, 154]]
    assert_defined(path, inputs)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_do_not_begin_a_chunk_keep_their_slots(path):
    inputs = reference_step.made([17, 18, 19], (5, 4), (2, 4), 5, with_given=False, tau=None)
    found = results(path, inputs)
    for name in STATE[4:]:
        if name in ("slot_k_bmhp", "slot_v_bmhp", "slot_log_e_bm"):
            assert torch.equal(found[name][:, :-1], getattr(inputs, name)[:, :-1]), name
    assert torch.equal(found["slot_position_bm"], inputs.slot_position_bm)


def test_triton_takes_the_layout_of_a_decoding_state_and_a_predictor_of_one_weight_per_tap():
    inputs = reference_step.made([16, 17], (5, 4), (2, 4), 5, with_given=False, tau=7.0)
    rings = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_brhp", "v_brhp", "slot_k_bmhp", "slot_v_bmhp")
    }
    wide = torch.cat([inputs.y_bd, inputs.y_bd], 1)[:, : inputs.y_bd.shape[1]]
    assert_defined("triton", inputs._replace(y_bd=wide, weight_kd=normal(3, 1), **rings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_moves_keys_and_outputs_to_the_last_bit(dtype):
    inputs = reference_step.made([16, 17], (5, 4), (2, 4), 5, with_given=False, tau=None)
    low = ("y_bd", "past_bkd", "k_brhp", "v_brhp", "slot_k_bmhp", "slot_v_bmhp")
    inputs = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in low})
    got, want = results("triton", inputs), results("torch", inputs)
    for name in (*low[1:], "slot_position_bm"):
        assert torch.equal(got[name], want[name]), name
    torch.testing.assert_close(got["score"], want["score"], rtol=2e-5, atol=2e-5)


def test_the_step_passes_opcheck():
    torch.library.opcheck(triton_step.step, tuple(reference_step.example()))


def test_limits_are_named():
    inputs = reference_step.example()
    with use("triton"), pytest.raises(ValueError, match=r"float16 and float32, not torch\.float64"):
        innovation_step(*inputs._replace(y_bd=inputs.y_bd.double()))
    with use("triton"), pytest.raises(ValueError, match="at most 16 taps, 4096 slots"):
        innovation_step(*inputs._replace(chunk_size=5000))
    with use("triton"), pytest.raises(ValueError, match="one dtype"):
        innovation_step(*inputs._replace(slot_k_bmhp=inputs.slot_k_bmhp.bfloat16()))
    with use("triton"), pytest.raises(ValueError, match="laid out"):
        innovation_step(*inputs._replace(log_e_br=inputs.log_e_br.t().contiguous().t()))
