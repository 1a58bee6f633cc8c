"""The work of the measure `decoding`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bmojo.decoding import Decoder
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures.figures import figure_of, point_of
from pipelines.stages.evaluate.measures.measure import Measured
from pipelines.stages.evaluate.results import Curve, CurvePoint, Figure, MeasureResult
from pipelines.stages.train.device import synchronize
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.measures.decoding import DecodingConfig
    from pipelines.stages.evaluate.measures.measure import TaskResult

_WARM_UP = 4  # on a GPU the first is compiled, the second recorded


@dataclass(frozen=True)
class TimeSteps:
    """Read `position` random tokens per row, then time `num_steps` more, one by one, after some that warm up."""

    position: int
    rows: int
    num_steps: int

    @torch.inference_mode()
    def run(self, host: Host) -> TaskResult:
        """Returns: `ms` of each step; `state_bytes` per row at the end. Both are empty if the model is not of ours."""
        model = host.generator
        if not isinstance(model, NativeModel):
            return {"ms": np.zeros(0), "state_bytes": np.zeros(0, np.int64)}
        rng = torch.Generator().manual_seed(0)
        ids_bt = torch.randint(model.vocab_size, (self.rows, self.position + 1), generator=rng).to(model.device)
        _, state = model.module.prefill(ids_bt[:, :-1])
        decoder = Decoder(model.module, state, max_tokens=self.position + self.num_steps + _WARM_UP)
        took_ms = []
        for _ in range(self.num_steps + _WARM_UP):
            synchronize(model.device)
            begun = time.perf_counter()
            decoder.step(ids_bt[:, -1])
            synchronize(model.device)
            took_ms.append(1e3 * (time.perf_counter() - begun))
        return {
            "ms": np.array(took_ms[_WARM_UP:]),
            "state_bytes": np.array([decoder.state.num_bytes() // self.rows], np.int64),
        }


def measured(config: DecodingConfig, results: Mapping[str, TaskResult]) -> Measured:
    """Mean time of a step and size of the state, at each position. Units are steps."""
    figures: list[Figure] = []
    times, sizes = [], []
    for position, result in zip(dict.fromkeys(config.positions), results.values(), strict=True):
        if not len(result["ms"]):
            continue
        ratio = Ratio(result["ms"], np.full(len(result["ms"]), float(config.rows)))
        size = float(result["state_bytes"][0])
        times.append(point_of(position, ratio))
        sizes.append(CurvePoint(x=position, y=size))
        figures += [
            figure_of(f"ms_per_token_{position}", ratio, unit="ms per token"),
            Figure(name=f"state_bytes_{position}", value=size, unit="bytes per sequence"),
        ]
    if not figures:
        note = "Decoding: only models of ours have a state whose size can be asked for."
        return Measured(MeasureResult(name=config.called, kind="decoding", unit="step", num_units=0, notes=(note,)))
    about = f"{config.rows} sequences at once" if config.rows > 1 else "One sequence"
    note = f"{about}; mean of {config.num_steps} tokens at each position, beside what else the machine did then."
    return Measured(
        MeasureResult(
            name=config.called,
            kind="decoding",
            unit="step",
            num_units=config.num_steps,
            figures=tuple(figures),
            curves=(
                Curve(
                    name="ms_per_token", title="Time per token in decoding", x_label="position (tokens)",
                    y_label="ms per token", points=tuple(times), log_x=True, note=note,
                ),
                Curve(
                    name="state_bytes", title="Size of the decoding state", x_label="position (tokens)",
                    y_label="bytes per sequence", points=tuple(sizes), log_x=True,
                ),
            ),
        )
    )  # fmt: skip
