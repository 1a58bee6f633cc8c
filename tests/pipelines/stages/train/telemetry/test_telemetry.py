"""What a training on the CPU tells of itself: times, use of the workers, a profile, a warning about slow data."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.stages.train import device
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.stages.train.telemetry import usage as usage_module
from pipelines.stages.train.telemetry.telemetry import Telemetry
from pipelines.stages.train.telemetry.times import Part
from pipelines.stages.train.telemetry.usage import WorkerUsage
from tests.pipelines.stages.train.plain_trainer import PlainTrainer, train_plainly
from tests.pipelines.stages.train.trainer_contract import initial_model
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def trained(
    single_process: None,
    train_config: Callable[..., TrainStageConfig],
    tokens: Tokens,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, TrainFacts, FileSink]:
    """Six steps, of which the third and fourth are traced."""
    folder = tmp_path_factory.mktemp("telemetry") / "train-0"
    sink = FileSink(folder.with_suffix(".jsonl"))
    config = train_config(max_steps=6, log_every_steps=2, profile={"steps": [3, 4]})
    return folder, train_plainly(make_job(config, TrainInputs((tokens,)), context_of(folder), sink)), sink


def test_times_of_every_part_are_curves_that_add_up_to_no_more_than_the_time(
    trained: tuple[Path, TrainFacts, FileSink],
) -> None:
    _, facts, _ = trained
    history = facts.history
    assert [step for step, _ in history["train/hours"]] == [1, 2, 4, 6]
    assert history["train/hours"][-1][1] == pytest.approx(facts.train_time_s / 3600)
    for part in ("data", "forward"):
        assert all(seconds >= 0 for _, seconds in history[f"train/time/{part}"])
    steps_of_point = {1: 1, 2: 1, 4: 2, 6: 2}
    parts = [points for name, points in history.items() if name.startswith("train/time/")]
    measured = sum(seconds * steps_of_point[step] for points in parts for step, seconds in points)
    assert 0 < measured <= facts.train_time_s


def test_the_profile_names_operators_and_the_traced_steps_only(trained: tuple[Path, TrainFacts, FileSink]) -> None:
    folder = trained[0] / "profile" / "rank-0"
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("backward" in name.lower() for name in names)
    optimizer_steps = [name for name in names if name.startswith("Optimizer.step")]
    assert len(optimizer_steps) == 2
    assert "Self CPU" in (folder / "operators.txt").read_text()


def test_the_use_of_each_worker_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Clock:
        now_s = 0.0

        def monotonic(self) -> float:
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(usage_module, "time", clock)
    sink = FileSink(tmp_path / "metrics.jsonl")
    usages = [WorkerUsage(sink, rank, num_workers, device.CPU) for rank, num_workers in ((3, 8), (40, 160))]
    for step in range(1, 32):
        for usage in usages:
            usage.report(step)
        clock.now_s += 4
    memory = sink.points("system/worker3/memory_rss_megabytes")
    assert [step for step, _ in memory] == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31]
    assert all(value > 50 for _, value in memory)
    assert [step for step, _ in sink.points("system/worker40/cpu_percentage")] == [1, 26], "160 workers tell less often"


def test_the_use_of_a_gpu_is_asked_of_torch_and_without_nvml_its_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Module:
        utilization = staticmethod(lambda _: 97)
        power_draw = staticmethod(lambda _: 650_000)
        temperature = staticmethod(lambda _: 61)
        memory_allocated = staticmethod(lambda _: 10_000_000)
        memory_reserved = staticmethod(lambda _: 20_000_000)
        max_memory_allocated = staticmethod(lambda _: 15_000_000)

    def missing(_: Any) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    memory = {
        "gpu_memory_allocated_megabytes": 10.0,
        "gpu_memory_reserved_megabytes": 20.0,
        "gpu_memory_peak_megabytes": 15.0,
    }
    gpu = torch.device("cuda", 0)
    assert device.usage_of(gpu) == memory | {
        "gpu_utilization_percentage": 97.0,
        "gpu_power_usage_watts": 650.0,
        "gpu_temperature_celsius": 61.0,
    }
    assert not caplog.records
    monkeypatch.setattr(Module, "utilization", staticmethod(missing))
    device._tell_of_missing_usage.cache_clear()
    assert device.usage_of(gpu) == device.usage_of(gpu) == memory
    (record,) = caplog.records
    assert "pynvml does not seem to be installed" in record.getMessage()
    assert "pip install -c constraints.txt -e '.[gpu]'" in record.getMessage()


def test_the_library_that_torch_asks_about_gpus_has_what_it_asks_for() -> None:
    """Where it is installed; its version is in constraints.txt."""
    pynvml = pytest.importorskip("pynvml")  # of the extra gpu
    asked = ("nvmlInit", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature")
    assert all(callable(getattr(pynvml, name)) for name in asked)


def test_waits_for_data_are_warned_about_once_with_a_remedy(
    train_config: Callable[..., TrainStageConfig],
    tiny_model: dict[str, Any],
    tokens: Tokens,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = train_config(model=tiny_model | {"vocab_size": 320})
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "m.jsonl"))
    telemetry = Telemetry(job, PlainTrainer(initial_model(config), config))
    with caplog.at_level(logging.WARNING):
        telemetry._look_at_starvation(10, {Part.DATA: 0.09}, step_s=1.0)
        assert not caplog.records
        telemetry._look_at_starvation(20, {Part.DATA: 0.5}, step_s=1.0)
        telemetry._look_at_starvation(30, {Part.DATA: 0.9}, step_s=1.0)
    (record,) = caplog.records
    assert "waited for data 50% of the time up to step 20" in record.getMessage()
    assert "data.cache_bytes" in record.getMessage()
