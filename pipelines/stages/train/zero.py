"""DeepSpeed behind a small interface: build the engine, take a step, read and write whole tensors by parameter name.

The module is never cast: parameters, gradients and optimizer state are float32 under every precision and bf16 means
autocast around the forward (docs/design/0021). DeepSpeed's own checkpoints are not used (docs/design/0020).
"""

from __future__ import annotations

import logging
import os
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from bmojo import BMojoLM, is_ssm_param
from pipelines.stages.train.config import TrainStageConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Objective(nn.Module):
    """The model with its loss inside, so that DeepSpeed's hooks see one forward that returns one tensor."""

    def __init__(self, model: BMojoLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens_bt: torch.Tensor, targets_bt: torch.Tensor, doc_ids_bt: torch.Tensor, token_losses: bool = False
    ) -> torch.Tensor:
        """The training loss, a scalar; with `token_losses` the pure NLL of each target (b, t), 0 where ignored."""
        output = self.model(tokens_bt, targets_bt, doc_ids_bt, token_losses=token_losses)
        result = output.nll_bt if token_losses else output.loss
        assert result is not None
        return result


class ZeroTrainer:
    """A model under DeepSpeed ZeRO with AdamW."""

    def __init__(self, model: BMojoLM, config: TrainStageConfig, num_workers: int, device: torch.device) -> None:
        """`model` is on the CPU with its weights already set, the same on every rank."""
        _init_communication()
        self.config = config
        self.model = model
        self.device = device
        optimizer = torch.optim.AdamW(
            model.param_groups(config.weight_decay),
            lr=0.0,  # set before every step; 0 so that nothing DeepSpeed does at start can move a weight
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.engine, _, _, _ = deepspeed.initialize(
            model=Objective(model),
            optimizer=optimizer,
            config=deepspeed_config(config, num_workers, device),
            dist_init_required=False,
        )
        self._optimizer = optimizer
        self._seed_optimizer_state()
        self._check_dtypes()

    def backward(self, tokens_bt: Any, targets_bt: Any, doc_ids_bt: Any, weight: float) -> torch.Tensor:
        """Forward and backward of one micro batch; its gradient counts `weight` times. Returns the loss, detached."""
        loss: torch.Tensor = self.engine(tokens_bt, targets_bt, doc_ids_bt)
        self.engine.backward(loss * weight)
        return loss.detach()

    def finish_micro_batch(self, lr: float) -> float | None:
        """Count a micro batch; after the last one of a step, update the weights.

        Returns: the global gradient norm before clipping where a step was due (inf or nan: not applied), else None.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self.config.zero_stage == 0:
            return self._step_unsharded()
        self.engine.step()
        if not self.engine.was_step_applied():
            return float("inf")
        return float(self.engine.get_global_grad_norm())

    def token_losses(self, tokens_bt: Any, targets_bt: Any, doc_ids_bt: Any) -> torch.Tensor:
        """NLL of each target (b, t) in float32, without a graph."""
        self.engine.eval()
        with torch.no_grad():
            nll_bt: torch.Tensor = self.engine(tokens_bt, targets_bt, doc_ids_bt, token_losses=True)
        self.engine.train()
        return nll_bt

    def whole_parameter(self, name: str) -> torch.Tensor:
        """A parameter's float32 value, whole. A collective: every rank asks for the same names in the same order."""
        param = self._params[name]
        full = safe_get_full_fp32_param(param) if self.config.zero_stage else param.detach()
        return full.detach().reshape(self.shapes[name])

    def whole_moment(self, name: str, moment: str) -> torch.Tensor:
        """AdamW's `exp_avg` or `exp_avg_sq` of a parameter, whole. A collective, like whole_parameter."""
        param = self._params[name]
        if self.config.zero_stage == 0:
            value: torch.Tensor = self._optimizer.state[param][moment]
            return value
        return safe_get_full_optimizer_state(param, moment).reshape(self.shapes[name])

    def set_moment(self, name: str, moment: str, value: torch.Tensor) -> None:
        """Put back a whole moment; each rank keeps its part."""
        param = self._params[name]
        if self.config.zero_stage == 0:
            self._optimizer.state[param][moment].copy_(value)
        elif self.config.zero_stage == 3:
            self._set_stage3_moment(param, moment, value)
        else:
            safe_set_full_optimizer_state(param, value.to(self.device), moment)

    @property
    def optimizer_steps(self) -> int:
        """AdamW's step count."""
        return int(self._optimizer.state[self._flat_tensors()[0]]["step"])

    def set_optimizer_steps(self, steps: int) -> None:
        """Put back AdamW's step count."""
        for flat in self._flat_tensors():
            self._optimizer.state[flat]["step"].fill_(float(steps))

    def local_optimizer_numel(self) -> int:
        """Elements of the first moment that this rank holds: what ZeRO shards."""
        return sum(self._optimizer.state[flat]["exp_avg"].numel() for flat in self._flat_tensors())

    @property
    def _params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Whole shape of each parameter by name (under ZeRO 3 the parameter itself is empty between uses)."""
        return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters()}

    def _flat_tensors(self) -> list[torch.Tensor]:
        """The tensors that AdamW really updates on this rank: flat partitions under ZeRO, the parameters without."""
        if self.config.zero_stage == 0:
            return [p for p in self.model.parameters() if p.requires_grad]
        if self.config.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _seed_optimizer_state(self) -> None:
        """Make AdamW's state now (it makes it at its first step) so that a checkpoint can be put into it."""
        for flat in self._flat_tensors():
            self._optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
            }
        if self.config.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_stage3_moment(self, param: nn.Parameter, moment: str, value: torch.Tensor) -> None:
        # safe_set_full_optimizer_state fails where the workers do not divide the tensor's size: pad and cut ourselves.
        part = safe_get_local_optimizer_state(param, moment).numel()
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        padded = torch.zeros(part * world_size, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(param, padded[part * rank : part * (rank + 1)].to(self.device), moment)

    def _step_unsharded(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            return float(norm)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        self.engine.step()
        return float(norm)

    def _check_dtypes(self) -> None:
        wrong = {name: p.dtype for name, p in self.model.named_parameters() if p.dtype != torch.float32}
        if wrong:
            ssm = [name for name in wrong if is_ssm_param(name)]
            raise RuntimeError(
                f"parameters are not float32 after DeepSpeed started: {wrong}; among them of the SSM: {ssm}."
            )


def deepspeed_config(config: TrainStageConfig, num_workers: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration for ours."""
    on_gpu = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # On the CPU a collective cannot overlap with computing on the same cores, and contiguous buckets only add
        # copies; none of these settings gains anything there (measured: docs/design/0021).
        "overlap_comm": on_gpu,
        "contiguous_gradients": on_gpu or config.zero_stage == 3,
        "reduce_scatter": on_gpu,
        "round_robin_gradients": on_gpu and config.zero_stage in (1, 2),
    }
    if config.zero_stage == 3:
        # Whole layers at a time: the model is small beside what ZeRO 3 is made for.
        zero["stage3_param_persistence_threshold"] = 10_000
    if config.offload is not None:
        if config.offload.optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if config.offload.parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    result: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * num_workers),
        # Without ZeRO we clip ourselves: DeepSpeed then keeps the norm to itself.
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.autocast_bf16:
        # No module is named as safe for bfloat16 *communication*: gradients are reduced in float32.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return result


def quiet_logs() -> None:
    """DeepSpeed tells every rank's console about its start; warnings and errors still pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _init_communication() -> None:
    """Attach DeepSpeed to the process group that Ray Train made.

    On the CPU it would first compile a shared-memory all-reduce meant for inference (45 s and a C++ compiler);
    training never calls it, so it is marked as unavailable. gloo does the work.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
