"""Models whose figures, curves and texts are made up, for tests of the page and to look at it.

`python -m tests.pipelines.stages.report.made_up FOLDER [MODELS] [SEEDS]` writes a page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.stages.evaluate.results import Curve, CurvePoint, Figure, Mark, MeasureResult, SampleText
from pipelines.stages.report.identity import Fact, RunIdentity
from pipelines.stages.report.page import Content, StageSummary
from pipelines.stages.sections import Section, Series, Table, Training
from pipelines.stages.uncertainty import Ratio, interval
from pipelines.storage.artifact import ArtifactDir

NAMES = (
    "bmojo", "bmojo_f", "mamba2", "swa", "attention", "gated_delta", "hybrid-3-to-1", "bmojo-window-64",
    "bmojo-window-512", "mamba2-with-attention", "linear", "rwkv",
)  # fmt: skip
STEPS = 320
NUM_DOCUMENTS = 60


def section(
    folder: Path, name: str, loss: float, seed: int = 0, recipe: dict[str, Any] | None = None, documents: int = 1
) -> Section:
    """A trained and evaluated model. Args: loss: about; documents: seed of the validation split."""
    rng = np.random.default_rng(abs(hash((name, seed))) % 2**32 if False else sum(map(ord, name)) + 1000 * seed)
    artifact = ArtifactDir.at(folder / f"evaluate-{name.replace('/', '-')}-{seed}")
    return Section(
        subject=name,
        facts={"layers": f"{name}*4", "parameters": f"{4 + rng.random():.2f} M", "tokens/s": f"{9000 + 100 * seed:,}",
               "seed": str(seed)},
        training=training(loss, rng, seed, recipe or {"model.pattern": f"{name}*4", "lr": 0.003}),
        results=[text(artifact, loss, rng, documents), position(loss, rng)],
        artifact=artifact,
        data=[Table(title="tokens", columns=("split", "documents", "tokens"),
                    rows=[["training", "601", "2,400,000"], ["validation", "60", "180,000"]],
                    notes=["Vocabulary: 4,096 token ids.", "Filters: exact_duplicates."])],
    )  # fmt: skip


def training(loss: float, rng: np.random.Generator, seed: int, recipe: dict[str, Any]) -> Training:
    steps = np.arange(1, STEPS + 1, 2)
    curve = loss + 4.5 * np.exp(-steps / 30) + 0.5 * np.exp(-steps / 200)
    noisy = curve + rng.normal(0, 0.08, len(steps))
    lr = 3e-3 * np.minimum(steps / 40, 0.5 * (1 + np.cos(np.pi * steps / STEPS)))
    valid = [(int(step), float(value)) for step, value in zip(steps[::20], curve[::20] + 0.05, strict=True)]

    def points(values: np.ndarray) -> list[tuple[float, float]]:
        return [(int(step), float(value)) for step, value in zip(steps, values, strict=True)]

    nats = "nats per token"
    series = [
        Series(plot="loss", title="Loss", part="training", y_label=nats, points=points(noisy), is_noisy=True,
               is_loss=True),
        Series(plot="loss", title="Loss", part="validation", y_label=nats, points=valid, is_loss=True),
        Series(plot="lr", title="Learning rate", y_label="", points=points(lr)),
        Series(plot="grad-norm", title="Gradient norm", y_label="before clipping", is_noisy=True,
               points=points(np.exp(rng.normal(0, 0.3, len(steps))))),
        Series(plot="mfu", title="Model FLOP/s utilisation (MFU)", y_label="share of the peak", is_noisy=True,
               points=points(0.4 + rng.normal(0, 0.02, len(steps))), note="The peak is 0.12 TFLOP/s, of 2 x CPU."),
    ]  # fmt: skip
    tokens = points(steps * 4096.0)
    return Training(series=series, tokens=[(0, 0), *tokens], seconds=[(0, 0), *points(steps * 0.43)], recipe=recipe,
                    seed=seed)  # fmt: skip


def text(artifact: ArtifactDir, loss: float, rng: np.random.Generator, documents: int) -> MeasureResult:
    shared = np.random.default_rng(documents)
    tokens = np.ceil(np.exp(shared.normal(7, 1, NUM_DOCUMENTS)))
    hardness = shared.normal(0, 0.5, NUM_DOCUMENTS)
    nats = tokens * (loss + hardness + rng.normal(0, 0.04, NUM_DOCUMENTS))
    units = write_units(artifact, "text", f"documents {documents}", loss=(nats, tokens),
                        bits_per_byte=(nats / np.log(2), 3.5 * tokens))  # fmt: skip
    of_loss, of_bits = interval(Ratio(nats, tokens)), interval(Ratio(nats / np.log(2), 3.5 * tokens))
    perplexity = interval(Ratio(nats, tokens), "exp")
    return MeasureResult(
        name="text", kind="text", unit="document", num_units=NUM_DOCUMENTS, units=units,
        figures=(
            figure("loss", of_loss, unit="nats per token", is_main=True),
            figure("perplexity", perplexity, transform="exp"),
            figure("bits_per_byte", of_bits, unit="bits per byte", is_main=True),
        ),
        references=(Figure(name="gzip -9", value=2.236, unit="bits per byte"),
                    Figure(name="untrained", value=3.4 + rng.random() / 50, unit="bits per byte")),
        samples=(SampleText(prompt="", text="def f(x):\n    return x < 1\n\n\n\n\n\n\nclass A:\n    pass\n"),
                 SampleText(prompt="import os\n", text="import sys\n")),
        notes=("Loss and bits per byte are on the validation split.",),
    )  # fmt: skip


def figure(name: str, estimate: Any, **fields: Any) -> Figure:
    return Figure(name=name, value=estimate.value, low=estimate.low, high=estimate.high, **fields)


def write_units(artifact: ArtifactDir, measure: str, identity: str, **sums: tuple[np.ndarray, np.ndarray]) -> str:
    """The file with the sums of each unit, as measures write it. Returns its path in the artifact."""
    path = f"units/{measure}.npz"
    file = artifact.local / path
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}.{part}": array for name, pair in sums.items()
              for part, array in zip(("numerator", "denominator"), pair, strict=True)}  # fmt: skip
    np.savez(file, allow_pickle=False, identity=np.array(identity), **arrays)  # type: ignore[arg-type]
    return path


def position(loss: float, rng: np.random.Generator) -> MeasureResult:
    ends = np.arange(64, 2049, 64)
    curve = loss + 1.2 * np.exp(-ends / 120) + rng.normal(0, 0.03, len(ends))
    points = tuple(
        CurvePoint(x=float(x), y=float(y), low=float(y - 0.08), high=float(y + 0.08))
        for x, y in zip(ends, curve, strict=True)
    )
    drawn = Curve(name="position", title="Loss by position in the document", x_label="position (tokens)",
                  y_label="nats per token", points=points, mark=Mark(x=512, label="training length"),
                  note="Documents of 2,048 tokens and more, each from an empty memory.")  # fmt: skip
    figures = (Figure(name="far_loss", value=float(curve[-8:].mean()), low=float(curve[-8:].mean() - 0.05),
                      high=float(curve[-8:].mean() + 0.05), unit="nats per token"),)  # fmt: skip
    return MeasureResult(name="position", kind="position", unit="window", num_units=16, figures=figures,
                         curves=(drawn,))  # fmt: skip


def content(sections: Sequence[Section], **fields: Any) -> Content:
    run = RunIdentity(
        "compare-0123abcd",
        (
            Fact("run", "compare-0123abcd"),
            Fact("command", "bmojo run configs/compare.yaml train.lr=1e-3"),
            Fact("commit", "0123456789abcdef0123456789abcdef01234567 with local changes"),
            Fact("MLflow", "https://mlflow.example.org/#/runs/1", "https://mlflow.example.org/#/runs/1"),
        ),
    )
    made_by = Table(title="Stages", columns=("stage", "kind", "duration"), rows=[["train", "train", "8 min 20 s"]])
    stage = StageSummary("train", "train", "0123456789abcdef", {"kind": "train", "lr": 0.003})
    known: dict[str, Any] = {"title": "Made up", "about": "Written today.", "runs": [run], "sections": sections,
                             "made_by": made_by, "stages": [stage], **fields}  # fmt: skip
    return Content(**known)


def models(folder: Path, number: int, num_seeds: int = 1) -> list[Section]:
    found = []
    for index, name in enumerate(NAMES[:number]):
        for seed in range(num_seeds):
            loss = 3.2 + 0.03 * ((index * 7) % number) + 0.02 * seed * (index % 2)
            label = f"train-{name}" + (f"-{seed}" if num_seeds > 1 else "")
            recipe = {"model.pattern": f"{name}*4", "lr": 0.003}
            found.append(section(folder, label, loss, seed, recipe))
    return found


if __name__ == "__main__":
    from pipelines.stages.report.page import build_report

    target, *numbers = sys.argv[1:]
    counts = [*map(int, numbers), 5, 1][:2] if len(numbers) < 2 else list(map(int, numbers))
    target_folder = Path(target)
    target_folder.mkdir(parents=True, exist_ok=True)
    made = models(target_folder / "artifacts", counts[0], counts[1])
    build_report(content(made, title=f"{counts[0]} models, made up")).write(target_folder)
