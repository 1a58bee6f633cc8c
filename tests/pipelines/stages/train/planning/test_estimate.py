"""Plans of train stages: what they say, what they refuse, and that they say it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base.errors import UserError
from pipelines.engine.stage import Machines
from pipelines.errors import FieldError
from pipelines.loading import load_pipeline
from pipelines.stages.train.planning import estimate, fitting
from pipelines.stages.train.planning.calibration import ProcessMemory
from pipelines.stages.train.planning.hardware import HARDWARE, known_peak, named, of_device
from pipelines.stages.train.planning.probe import measure
from pipelines.stages.train.planning.speed import known_steps, plan_speed, remember
from pipelines.stages.train.planning.states import model_size
from pipelines.stages.train.planning.steps import Steps
from pipelines.stages.train.planning.words import in_words, size
from tests.pipelines.test_loading import PIPELINE

PROCESS = ProcessMemory(base_bytes=800 << 20, per_activation_byte=1.1)
STEPS = Steps(step_s=0.5, peak_bytes=10**9, start_bytes=1, num_workers=2)

Node = Callable[..., Any]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """The train stage of a small pipeline with overrides."""
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "tiny.yaml"
    file.write_text(PIPELINE.replace("seq_len: 64", "seq_len: 128"))

    def make(*overrides: str) -> Any:
        graph = load_pipeline(file, [f"train.{override}" for override in overrides]).graph()
        return next(node for node in graph if node.name == "train")

    return make


def test_more_cpus_than_cores_do_not_shorten_the_estimate(node: Node) -> None:
    def step_s(cpus: int) -> float:
        train, seq_len = fitting.sized_training(node(f"resources.cpus_per_worker={cpus}"))
        return plan_speed(train, seq_len, None, 1e10, 2).step_s

    assert step_s(1) == step_s(30)


def test_measured_steps_are_used_for_the_same_settings_only(node: Node) -> None:
    train, seq_len = fitting.sized_training(node())
    remember(train, seq_len, STEPS, "a test")
    speed = plan_speed(train, seq_len, None, 1e10, 2)
    assert (speed.step_s, speed.is_measured) == (0.5, True)
    assert "a test" in speed.source
    for other in ("micro_batch_size=1", "backend={kind: deepspeed, zero_stage: 0}", "model.d_model=64"):
        assert known_steps(*fitting.sized_training(node(other))) is None
    assert known_steps(*fitting.sized_training(node("max_steps=77", "lr=1e-2"))) is not None
    assert not plan_speed(train, seq_len, named("h100"), 1e10, 2).is_measured


def test_a_plan_is_the_same_again(node: Node) -> None:
    plans = [estimate.plan_training(node(), Machines(2.0), PROCESS) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].memory.peak > PROCESS.base_bytes


def test_recomputed_activations_take_time(node: Node) -> None:
    gpus = Machines(2.0, hardware="h100")
    none, attention, block = (
        estimate.plan_training(node(f"activation_checkpointing={part}", "resources.num_workers=1"), gpus, None)
        for part in ("none", "attention", "block")
    )
    assert none.speed.step_s < attention.speed.step_s < block.speed.step_s
    assert block.speed.step_s < 4 / 3 * none.speed.step_s
    assert block.memory.activations < none.memory.activations


def test_the_plan_names_price_and_what_fits(node: Node) -> None:
    costs, memory, fits = estimate.estimate_all([node()], Machines(2.0, hardware="h100", price_per_hour=2.5))
    assert costs.columns[-1] == "cost"
    assert "34% of h100's 989 TFLOP/s" in " ".join(costs.notes)
    assert memory.rows[0][0] == "train"
    assert {row[1] for row in fits.rows} >= {"2", "4", "8"}
    assert all("fits" in row[3] for row in fits.rows)


def test_the_plan_names_the_sizes_of_an_elastic_group(node: Node) -> None:
    elastic = node("global_batch_size=12", "resources.num_workers=4", "resources.min_workers=2")
    costs, memory, _ = estimate.estimate_all([elastic], Machines(2.0, hardware="h100"))
    said = "train trains on 2, 3 or 4 workers: time is that of 4, memory that of 2."
    assert said in costs.notes
    assert memory.rows[0][1] == "2"
    costs, *_ = estimate.estimate_all([node()], Machines(2.0, hardware="h100"))
    assert not any("trains on" in note for note in costs.notes)


@pytest.mark.ci
def test_what_cannot_fit_is_refused_with_what_would_help(node: Node) -> None:
    large = node("micro_batch_size=4", "model.d_model=8192", "model.num_heads=64", "model.pattern=bmojo*64")
    with pytest.raises(FieldError, match=r"needs at least .* A worker on l4 has 22\.4 GiB.*zero_stage") as refused:
        fitting.check_fits(large, Machines(2.0, hardware="l4"))
    assert "train" in str(refused.value)
    fitting.check_fits(node(), Machines(2.0, hardware="l4"))


ON_CORES = ("backend={kind: neuron}", "resources.neuron_cores_per_worker=1")


@pytest.mark.ci
def test_a_plan_for_neuron_cores_says_that_it_is_arithmetic(node: Node) -> None:
    costs, memory, fits = estimate.estimate_all([node(*ON_CORES)], Machines(2.0))
    said = " ".join([*costs.notes, *memory.notes])
    assert "the share that GPUs reach: no NeuronCore was measured" in said
    assert "Nothing was measured on NeuronCores: their memory, along the static path, and times are arithmetic" in said
    assert all("22.4 GiB" in row[2] for row in fits.rows), "of one logical core, whatever this machine has"


def test_activations_on_neuron_cores_are_those_of_the_static_path(node: Node) -> None:
    """It holds scores of all chunks at once, so it needs more than the kernels of other devices."""
    for_gpus, for_cores = (
        estimate.plan_training(node(*asked, "precision=bf16"), Machines(2.0, hardware=hardware), None).memory
        for asked, hardware in (((), "h100"), (ON_CORES, None))
    )
    assert for_cores.activations > for_gpus.activations
    assert (for_cores.process, for_cores.on_accelerator) == (0, True)


def test_fsdp2_shares_parameters_and_gradients_between_cores_and_sends_more(node: Node) -> None:
    zero1, fsdp2 = (
        fitting.sized_training(node(f"backend={{kind: neuron, parallel: {way}}}", ON_CORES[1]))[0]
        for way in ("zero1", "fsdp2")
    )
    (whole, shared) = (
        train.backend.states(model_size(train), 2, on_gpu=False, accumulates=True) for train in (zero1, fsdp2)
    )
    assert shared.parameters == pytest.approx(whole.parameters / 2, abs=4)
    assert shared.gradients == pytest.approx(whole.gradients / 2, abs=4)
    assert shared.optimizer == whole.optimizer
    assert zero1.backend.traffic(1000, 2, num_micro_batches=4) == 3 * 4 * 1000 / 2
    assert fsdp2.backend.traffic(1000, 2, num_micro_batches=4) == 4 * 3 * 4 * 1000 / 2


@pytest.mark.ci
def test_what_does_not_fit_a_core_is_refused_with_what_would_help(node: Node) -> None:
    large = node(*ON_CORES, "model.d_model=4096", "model.num_heads=64", "model.pattern=bmojo*32")
    with pytest.raises(FieldError, match=r"A worker on trn2 has 22\.4 GiB.*train\.backend\.parallel: fsdp2"):
        fitting.check_fits(large, Machines(2.0))


def test_other_hardware_and_measured_steps_are_refused_for_neuron_cores(node: Node) -> None:
    with pytest.raises(UserError, match=r"--hardware h100: this training runs on NeuronCores.*or name trn2"):
        fitting.check_fits(node(*ON_CORES), Machines(2.0, hardware="h100"))
    fitting.check_fits(node(*ON_CORES), Machines(2.0, hardware="trn2"))
    with pytest.raises(UserError, match=r"Measuring steps starts no NeuronCores\. Plan without --measure"):
        measure(*fitting.sized_training(node(*ON_CORES)))


def test_this_machine_is_looked_at_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "memory_size", lambda device: 1 << 20)
    with pytest.raises(FieldError, match="A worker here has 512 KiB"):
        fitting.check_fits(node(), Machines(2.0))


def test_small_models_are_let_through_without_working_them_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "plan_memory", lambda *_: pytest.fail("worked out"))
    fitting.check_fits(node(), Machines(2.0))


def test_hardware_has_one_name_each_and_a_variant_comes_before_its_family() -> None:
    names = [hardware.name for hardware in HARDWARE]
    assert len(set(names)) == len(names)
    for number, hardware in enumerate(HARDWARE):
        assert not any(set(earlier.words) <= set(hardware.words) for earlier in HARDWARE[:number])
        assert named(hardware.name.upper()) is hardware
    with pytest.raises(ValueError, match="Known: a100"):
        named("h1000")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Quadro X", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_an_a100_of_40_gb_is_not_one_of_80() -> None:
    small, large = of_device("NVIDIA A100-SXM4-40GB"), of_device("NVIDIA A100-SXM4-80GB")
    assert small is not None
    assert large is not None
    assert small.memory_bytes * 2 == large.memory_bytes


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.001, "1 s"), (100, "100 s"), (3600, "60.0 min"), (1e30, "more than 100 years")]
)
def test_durations_have_a_readable_size(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


def test_sizes_have_a_readable_unit() -> None:
    assert [size(n) for n in (0, 2048, 3 << 20, 5 << 30, 3 << 40)] == ["0", "2 KiB", "3 MiB", "5.0 GiB", "3.0 TiB"]
