"""Training by Muon and AdamW in float64 on one process, written from the papers' equations and from nothing of ours."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.config import MuonConfig
from tests.pipelines.stages.train.trainer_contract import Tensors, global_batch, initial_model


def steps_by_hand(config: TrainStageConfig, num_steps: int, lr: float) -> tuple[Tensors, list[float]]:
    """Named tensors after so many steps, and the gradient norms. No groups of parameters but the model's own."""
    assert isinstance(config.optimizer, MuonConfig)
    model = initial_model(config).double()
    values = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    kept = {name: {"momentum": 0.0 * value} for name, value in values.items() if is_matrix_of_a_block(name)}
    kept |= {name: {"exp_avg": 0.0 * v, "exp_avg_sq": 0.0 * v} for name, v in values.items() if name not in kept}
    norms = []
    for step in range(1, num_steps + 1):
        model.zero_grad()
        loss = model(*global_batch(step - 1)).loss
        loss.backward()
        gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))))
        scale = min(1.0, config.grad_clip / norms[-1])
        for name, value in values.items():
            gradient, state = gradients[name] * scale, kept[name]
            decays = value.ndim == 2 and "embedding" not in name and not name.endswith(("A_log", "predictor"))
            value *= 1 - lr * (config.weight_decay if decays else 0.0)
            if "momentum" in state:
                mu = config.optimizer.momentum
                state["momentum"] = mu * state["momentum"] + (1 - mu) * gradient
                nesterov = mu * state["momentum"] + (1 - mu) * gradient
                value -= lr * 0.2 * max(value.shape) ** 0.5 * iterated(nesterov, config.optimizer.num_iterations)
            else:
                first, second = config.betas
                state["exp_avg"] = first * state["exp_avg"] + (1 - first) * gradient
                state["exp_avg_sq"] = second * state["exp_avg_sq"] + (1 - second) * gradient**2
                mean, square = state["exp_avg"] / (1 - first**step), state["exp_avg_sq"] / (1 - second**step)
                value -= lr * mean / (square**0.5 + config.eps)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(values[name]))
    tensors = {f"param/{name}": value for name, value in values.items()}
    tensors |= {f"{kind}/{name}": value for name, state in kept.items() for kind, value in state.items()}
    return {key: torch.from_numpy(value) for key, value in tensors.items()}, norms


def is_matrix_of_a_block(name: str) -> bool:
    """A projection, by its name."""
    return name.startswith("blocks.") and name.endswith("_proj.weight")


def iterated(matrix: np.ndarray, num_iterations: int) -> np.ndarray:
    """What the iterations do to the singular values, one by one."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    singular = singular / np.sqrt((singular**2).sum())
    for _ in range(num_iterations):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    result: np.ndarray = (left * singular) @ right
    return result
