"""Steps of the eidetic memory, and what they leave."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.innovation_select import innovation_step, reference_step
from kernels.innovation_select.reference_step import StepInputs
from kernels.operator import use

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


def assert_ties_keep_their_order(path: str, tau: float | None) -> None:
    """What was kept stays ahead of what is new, and earlier positions of later ones."""
    inputs = reference_step.made([160], (5, 4), (2, 4), 6, with_given=True, tau=tau)
    position = torch.arange(152, 160)  # what may enter, and what is in the window still
    falling = 0.0 if tau is None else -position / tau  # all rank alike, and 1 / 8 is exact
    inputs.log_e_br[0, position % 9] = torch.zeros(8) + falling
    inputs.slot_position_bm[0] = torch.tensor([3, 20, 100, -1, -1, -1])
    inputs.slot_log_e_bm[0] = 0.0 if tau is None else -inputs.slot_position_bm[0] / tau
    assert results(path, inputs)["slot_position_bm"].tolist() == [[3, 20, 100, 152, 153, 154]]
    assert_defined(path, inputs)


def assert_slots_stay_within_a_chunk(path: str) -> None:
    """Rows that begin no chunk keep their slots."""
    inputs = reference_step.made([17, 18, 19], (5, 4), (2, 4), 5, with_given=False, tau=None)
    found = results(path, inputs)
    for name in ("slot_k_bmhp", "slot_v_bmhp", "slot_log_e_bm"):
        assert torch.equal(found[name][:, :-1], getattr(inputs, name)[:, :-1]), name
    assert torch.equal(found["slot_position_bm"], inputs.slot_position_bm)


SIZES = (
    [[16, 17], [3, 0], [4, 8], [160, 161], [9]],  # positions
    [1, 3, 5, 70],  # slots; 70 are copied in two parts
    [None, 7.3],  # tau
    [False, True],  # whether scores are given
)
