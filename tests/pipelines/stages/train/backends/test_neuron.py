"""The Neuron backend beyond what every trainer must do: sharding, shapes, graphs, faults, refused settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from base.errors import UserError
from data.shards import TokenBatch
from kernels.operator import use
from pipelines.errors import FieldError
from pipelines.stages.train.backends.neuron import NeuronTrainer
from pipelines.stages.train.backends.neuron_config import NeuronConfig
from pipelines.stages.train.config import TrainStageConfig, check_seq_len
from pipelines.stages.train.device import CPU
from tests.pipelines.stages.train import neuron_workers
from tests.pipelines.stages.train.neuron_workers import marked
from tests.pipelines.stages.train.plain_trainer import PlainTrainer
from tests.pipelines.stages.train.trainer_contract import LR, initial_model, micro_batches

pytestmark = pytest.mark.ci

MakeConfig = Callable[..., TrainStageConfig]
REHEARSED: dict[str, Any] = {"kind": "neuron", "device": "cpu"}
ON_CORES: dict[str, Any] = {"num_workers": 2, "neuron_cores_per_worker": 1}


@pytest.mark.parametrize(("parallel", "share"), [("zero1", 1.0), ("fsdp2", 0.5)])
def test_each_worker_holds_its_share(
    rehearsed_neuron: neuron_workers.Result, simulated_neuron: neuron_workers.Result, parallel: str, share: float
) -> None:
    for found in (*rehearsed_neuron.found[parallel], *simulated_neuron.found[parallel]):
        assert found["state_share"] == pytest.approx(0.5, abs=0.02)
        assert found["parameter_share"] == pytest.approx(share, abs=0.02)
        assert found["replicas"] == []


@pytest.mark.parametrize("parallel", neuron_workers.WAYS)
def test_averages_take_the_place_of_the_weights_and_go_again(
    rehearsed_neuron: neuron_workers.Result, simulated_neuron: neuron_workers.Result, parallel: str
) -> None:
    for found in (*rehearsed_neuron.found[parallel], *simulated_neuron.found[parallel]):
        assert found["averages"] == {"counts": True, "goes": True}


def test_bf16_leaves_parameters_and_moments_in_float32(
    rehearsed_neuron: neuron_workers.Result, simulated_neuron: neuron_workers.Result
) -> None:
    in_float32 = rehearsed_neuron.observed["zero1"][0].losses
    results = [
        each.found[parallel] for each in (rehearsed_neuron, simulated_neuron) for parallel in neuron_workers.WAYS
    ]
    for found in chain.from_iterable(results):
        assert found["bf16"]["dtypes"] == ["torch.float32"]
        assert found["bf16"]["losses"][2:] == pytest.approx(in_float32, rel=1e-3)
        assert found["bf16"]["losses"][2:] != in_float32


def test_marked_tokens_reach_the_device(
    rehearsed_neuron: neuron_workers.Result, simulated_neuron: neuron_workers.Result
) -> None:
    for parallel in neuron_workers.WAYS:
        for found, expected in zip(simulated_neuron.found[parallel], rehearsed_neuron.found[parallel], strict=True):
            assert found["marked"] == pytest.approx(expected["marked"], rel=1e-5)


@pytest.mark.parametrize("parallel", neuron_workers.WAYS)
def test_a_step_waits_for_the_device_once(simulated_neuron: neuron_workers.Result, parallel: str) -> None:
    for found in simulated_neuron.found[parallel]:
        assert found["operators"]["neuron::copy_to_host"] == 1
        assert "aten::_local_scalar_dense" not in found["operators"]
        assert found["operators"]["neuron::collective"] > 0
        assert found["operators_with_item"]["aten::_local_scalar_dense"] == 4, "a planted .item() per micro batch"


@pytest.mark.parametrize("parallel", neuron_workers.WAYS)
def test_faults_of_a_layer_end_the_step(simulated_neuron: neuron_workers.Result, parallel: str) -> None:
    for found in simulated_neuron.found[parallel]:
        assert "Expected all tensors to be on the same device" in found["faults"]["tensor of the CPU"]
        assert "no float64" in found["faults"]["float64"]


@pytest.fixture
def config(contract_config: Callable[[int], TrainStageConfig]) -> TrainStageConfig:
    one = contract_config(1)
    model = one.model.model_copy(update={"pattern": "(bmojo)*1"})
    return one.model_copy(update={"model": type(one.model).model_validate(model.model_dump()), "groups": ()})


class Graphs:
    """A compiler that captures graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        compiled: Callable[..., Any] = torch.compile(function, backend=self._keep, fullgraph=True, dynamic=False)
        return compiled

    def _keep(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def trainer_of(config: TrainStageConfig, compile: Callable[..., Any] | None = None) -> NeuronTrainer:
    return NeuronTrainer(initial_model(config), config, NeuronConfig.model_validate(REHEARSED), CPU, compile)


@pytest.fixture
def static_path() -> Iterator[None]:
    """Operators as on a NeuronCore."""
    with use("static"):
        yield


def test_no_graph_is_made_after_the_first_step_and_the_first_validation(
    config: TrainStageConfig, single_process: None, static_path: None
) -> None:
    graphs = Graphs()
    trainer = trainer_of(config, graphs)
    batches = micro_batches(config, 0)
    plain = trainer_of(config).step(batches, LR)
    first = trainer.step(batches, LR)
    assert float(first.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    assert float(first.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-5)
    trainer.token_losses(batches[0])
    made = graphs.count
    assert made >= 2, "a block, and the norm with head and loss"
    for number in range(1, 4):
        trainer.step(micro_batches(config, number)[:number], LR)
    one_row = batches[0].map(lambda tensor: tensor[:1])
    many_rows = TokenBatch(*(torch.cat([batch[field] for batch in batches]) for field in range(3)))
    assert trainer.token_losses(one_row).shape == one_row.tokens_bt.shape
    assert torch.equal(trainer.token_losses(many_rows)[:1], trainer.token_losses(one_row))
    assert graphs.count == made


def test_a_changing_shape_is_refused_before_it_compiles(config: TrainStageConfig, single_process: None) -> None:
    trainer = trainer_of(config)
    batches = micro_batches(config, 0)
    trainer.step(batches, LR)
    shorter = [batch.map(lambda tensor: tensor[:, :32]) for batch in batches]
    with pytest.raises(UserError, match=r"one graph for each shape: a batch has 2 rows of 32 tokens, expected 2 of 64"):
        trainer.step(shorter, LR)


def test_marked_tokens_of_synthetic_tasks_come_along(
    config: TrainStageConfig, single_process: None, static_path: None
) -> None:
    """The fourth part of a batch, which is there for tasks alone."""
    oracle = config.model_copy(update={"model": config.model.replace(selection="oracle")})
    trainer, plain = trainer_of(oracle), PlainTrainer(initial_model(oracle), oracle)
    batches = [marked(batch) for batch in micro_batches(oracle, 0)]
    for each in (trainer.step(batches, LR), plain.step(batches, LR)):
        assert math.isfinite(float(each.grad_norm))
    found, expected = trainer.step(batches, LR), plain.step(batches, LR)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    one_row = batches[0].map(lambda tensor: tensor[:1])
    assert torch.equal(trainer.token_losses(one_row), trainer.token_losses(batches[0])[:1])
    with pytest.raises(ValueError, match="nothing marks any here"):
        trainer.step(micro_batches(oracle, 0), LR)


def test_gradients_are_weighted_after_the_backward_alone(
    config: TrainStageConfig, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[Any] = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seeds.append(loss.grad_fn.name()), backward(loss))[1])
    trainer = trainer_of(config)
    trainer.step(micro_batches(config, 0), LR)
    assert len(seeds) == 4
    assert not any(name.startswith("Mul") for name in seeds), "no factor stands between loss and backward"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backend": {"kind": "neuron"}}, "neuron_cores_per_worker=0, expected 1.*backend.device: cpu"),
        ({"backend": {"kind": "neuron"}, "resources": {"neuron_cores_per_worker": 2}}, "found .*=2, expected 1"),
        ({"backend": REHEARSED, "resources": ON_CORES}, "backend.device=cpu is a rehearsal without NeuronCores"),
        ({"backend": REHEARSED, "resources": {"gpus_per_worker": 1}}, "resources.gpus_per_worker is 1"),
        ({"resources": ON_CORES}, "DeepSpeed has no accelerator for AWS Neuron. Set backend: {kind: neuron"),
        ({"backend": REHEARSED, "optimizer": {"kind": "muon"}}, "updates by adamw alone; found optimizer.kind=muon"),
        ({"backend": REHEARSED, "activation_checkpointing": "attention"}, "lies inside a block.*Use block or none"),
        ({"backend": REHEARSED | {"zero_stage": 1}}, "zero_stage"),
        ({"backend": REHEARSED | {"offload": {}}}, "offload"),
        (
            {"backend": {"kind": "neuron"}, "resources": ON_CORES, "profile": {"steps": [1, 2]}},
            "profile records CPUs and GPUs only",
        ),
    ],
)
def test_settings_that_cannot_run_there_are_refused(
    train_config: MakeConfig, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        train_config(**changes)


def test_a_forgetting_time_that_float32_has_not_is_refused(
    train_config: MakeConfig, tiny_model: dict[str, Any]
) -> None:
    train_config(backend=REHEARSED, model=tiny_model | {"innovation_tau": 512.0})
    with pytest.raises(ValidationError, match=r"innovation_tau=0\.1 is not a float32.*Set it to 0\.10000000149"):
        train_config(backend=REHEARSED, model=tiny_model | {"innovation_tau": 0.1})


def test_a_random_selection_is_refused(train_config: MakeConfig, tiny_model: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"model\.selection=random needs 64-bit hashes"):
        train_config(backend=REHEARSED, model=tiny_model | {"selection": "random"})


def test_sequences_must_be_of_whole_tiles(train_config: MakeConfig) -> None:
    config = train_config(backend=REHEARSED)
    check_seq_len(config, 256, "train", "tokens")
    with pytest.raises(FieldError, match=r"tokens\.seq_len: train: seq_len=64 is not a multiple of 128.*to 128"):
        check_seq_len(config, 64, "train", "tokens")


def test_a_neuron_core_trains_in_bf16_and_a_rehearsal_in_float32(train_config: MakeConfig) -> None:
    assert train_config(backend={"kind": "neuron"}, resources=ON_CORES).autocast_bf16
    assert not train_config(backend=REHEARSED).autocast_bf16


def test_the_backend_is_not_in_the_fingerprint(train_config: MakeConfig) -> None:
    settings = partial(train_config, precision="fp32")
    assert settings().settled() == settings(backend={"kind": "neuron"}, resources=ON_CORES).settled()
