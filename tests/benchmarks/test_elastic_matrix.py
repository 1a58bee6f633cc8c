"""A sample of the elastic matrix, and that it would tell what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.elastic_matrix import NUM_STEPS, SAVED_AT, Matrix, Setting, Trained, run_matrix

ONE, TWO = Setting(1, 0), Setting(2, 3)


@pytest.mark.slow
def test_another_number_of_workers_and_zero_stage_goes_on_exactly(tmp_path: Path) -> None:
    matrix = run_matrix([ONE, TWO], tmp_path)
    assert matrix.faults() == []
    assert len(matrix.resumed) == 4
    assert len(matrix.reference.samples[1]) == 12
    assert matrix.reference.samples[SAVED_AT + 1] == matrix.resumed[ONE, TWO].samples[SAVED_AT + 1]
    assert len({str(samples) for samples in matrix.reference.samples.values()}) == NUM_STEPS


def trained(first: int, **changes: object) -> Trained:
    steps = range(first, NUM_STEPS + 1)
    return Trained({step: 4.0 for step in steps}, {step: [[0, step, step]] for step in steps})._replace(
        **changes  # type: ignore[arg-type]  # of any field
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"is_put_back": False}, "parameters or moments are not those of the checkpoint"),
        ({"losses": {5: 4.0, 6: 4.0, 7: 4.0, 8: 4.00001}}, "a loss differs by 2.5e-06"),
        ({"losses": {5: 4.0, 6: 4.0, 7: float("nan"), 8: 4.0}}, "a loss differs by nan"),
        ({"losses": {6: 4.0, 7: 4.0, 8: 4.0}}, "steps [6, 7, 8] instead of [5, 6, 7, 8]"),
        ({"samples": {5: [[0, 4, 4]]}}, "a step has other samples"),
    ],
)
def test_what_is_wrong_in_one_pair_is_named(changes: dict[str, object], fault: str | None) -> None:
    whole, rest = trained(1), trained(SAVED_AT + 1)
    resumed = {(saved, other): rest for saved in (ONE, TWO) for other in (ONE, TWO)}
    resumed[ONE, TWO] = trained(SAVED_AT + 1, **changes)
    found = Matrix([ONE, TWO], {ONE: whole, TWO: whole}, resumed).faults()
    assert found == ([] if fault is None else [f"1/0 resumed on 2/3: {fault}"])
