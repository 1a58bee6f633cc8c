"""What bfloat16 changes in a bmojo model: which tokens are kept, and the logits. Prints Markdown.

Random models and one trained for a few hundred steps on this repository's own text, byte by byte. Each is compared
with itself in float32: cast to bfloat16, under autocast (as training on a GPU does), and decoding in bfloat16 with the
whole forward in bfloat16.

    python -m benchmarks.low_precision
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bmojo import BMojoLM, ModelConfig
from bmojo.mixers.bmojo import BMojo

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """What one pass over some sequences gave."""

    logits_btv: Tensor
    kept: list[set[int]]  # of every row, bmojo layer and chunk

    def differences(self, other: Run) -> tuple[float, float]:
        """Share of this run's kept tokens that the other lacks, and the relative rms of the logits' difference."""
        missing = sum(len(own - others) for own, others in zip(self.kept, other.kept, strict=True))
        logits, others = self.logits_btv.float(), other.logits_btv.float()
        return missing / max(1, sum(map(len, self.kept))), float((others - logits).norm() / logits.norm())


@torch.no_grad()
def whole(model: BMojoLM, tokens_bt: Tensor) -> Run:
    """All tokens at once."""
    output = model(tokens_bt, return_memory=True)
    assert output.logits_btv is not None
    assert output.memory is not None
    kept = [layer.kept_position_bjm for layer in output.memory if layer and layer.kept_position_bjm is not None]
    return Run(output.logits_btv, _sets(torch.stack(kept)))


@torch.no_grad()
def steps(model: BMojoLM, tokens_bt: Tensor) -> Run:
    """One token after the other."""
    state, logits, kept = model.init_state(tokens_bt.shape[0]), [], []
    for t in range(tokens_bt.shape[1]):
        logits_bv, state = model.step(tokens_bt[:, t], state)
        logits.append(logits_bv)
        if t % model.config.chunk_size == 0:
            slots = [x for path, x in state.tensors().items() if path.endswith("slots.position")]
            kept.append(torch.stack(slots).clone())
    return Run(torch.stack(logits, 1), _sets(torch.stack(kept, 2)))


def _sets(kept_lbjm: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in kept_lbjm.flatten(0, -2).tolist()]


def compare(model: BMojoLM, tokens_bt: Tensor) -> dict[str, tuple[float, float]]:
    """Each pair of runs and their differences."""
    model = model.float()
    low = copy.deepcopy(model).bfloat16()
    exact, whole_low = whole(model, tokens_bt), whole(low, tokens_bt)
    with torch.autocast(tokens_bt.device.type, torch.bfloat16):
        autocast = whole(model, tokens_bt)
    return {
        "bfloat16, whole": exact.differences(whole_low),
        "autocast, whole": exact.differences(autocast),
        "bfloat16, decoding": exact.differences(steps(low, tokens_bt)),
        "bfloat16, decoding and whole": whole_low.differences(steps(low, tokens_bt)),
    }


def random_model(config: ModelConfig, seed: int) -> BMojoLM:
    """Weights so large that every part shows: matrices normal(0, 1 / sqrt(fan in))."""
    model = BMojoLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def trained_model(config: ModelConfig, text_n: Tensor, num_steps: int, seq_len: int) -> BMojoLM:
    """Trained on random spans of a text."""
    model = BMojoLM(config)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 2e-3 * min(1, 2 * (1 - step / num_steps))
        tokens_bt = spans(text_n, 8, seq_len + 1, generator)
        loss = model(tokens_bt[:, :-1], tokens_bt[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"trained for {num_steps} steps to a loss of {loss.item():.2f} nats per byte\n", flush=True)
    return model


def spans(text_n: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(len(text_n) - length, (batch_size,), generator=generator).tolist()
    return torch.stack([text_n[i : i + length] for i in first])


def repository_text() -> Tensor:
    files = sorted(path for part in ("bmojo", "data", "kernels", "docs") for path in (ROOT / part).rglob("*.[pm][yd]"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def show(name: str, results: list[dict[str, tuple[float, float]]]) -> None:
    for row in results[0]:
        kept, logits = (statistics.mean(result[row][i] for result in results) for i in (0, 1))
        print(f"| {name} | {row} | {100 * kept:.2f} % | {logits:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="random models")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the trained model; 0: none")
    parser.add_argument("--tokens", type=int, default=384, help="tokens per sequence")
    parser.add_argument("--layers", type=int, default=2, help="bmojo layers")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = ModelConfig(
        pattern=f"bmojo*{arguments.layers}", vocab_size=256, d_model=64, num_heads=4, ssm_head_dim=16, d_state=16,
        window_size=32, chunk_size=16, num_eidetic=16, fading_output="memory_and_residual",
    )  # fmt: skip
    assert all(isinstance(block.mixer, BMojo) for block in BMojoLM(config).blocks)
    text_n, generator = repository_text(), torch.Generator().manual_seed(1)
    tokens_bt = spans(text_n, 4, arguments.tokens, generator).to(arguments.device)
    trained = trained_model(config, text_n, arguments.steps, 256) if arguments.steps else None
    print("| model | against float32, whole (last row: against bfloat16, whole) | kept tokens that differ | logits |")
    print("| --- | --- | --- | --- |")
    models = [random_model(config, seed) for seed in range(arguments.seeds)]
    show(f"random, {arguments.seeds} seeds", [compare(model.to(arguments.device), tokens_bt) for model in models])
    if trained is not None:
        show("trained", [compare(trained.to(arguments.device), tokens_bt)])


if __name__ == "__main__":
    main()
