"""A run with a finished train stage, made without training."""

from __future__ import annotations

from pathlib import Path

from bmojo import BMojoLM, ModelConfig
from bmojo.checkpoint_io import save_pretrained
from data.config import PythonStdlibSource, TokenizerFields
from data.tokenizer import Tokenizer, train_tokenizer
from pipelines.cli.models import TrainedModel
from pipelines.storage import open_storage
from tests.pipelines.made_runs import made_run

TEXT = "".join(f"def function_{n}(x):\n    return x + {n * n}  # naïve ☕\n" for n in range(12))


def tiny_model(pattern: str = "bmojo,mamba2,bmojo_f") -> BMojoLM:
    config = ModelConfig(
        pattern=pattern, vocab_size=320, d_model=32, num_heads=2, window_size=16, chunk_size=8, num_eidetic=4,
        d_state=8, ssm_head_dim=16, init_std=0.1,
    )  # fmt: skip
    return BMojoLM(config).eval()


def tiny_tokenizer() -> Tokenizer:
    fields = TokenizerFields(source=PythonStdlibSource(kind="python_stdlib"), vocab_size=300)
    return train_tokenizer([TEXT], fields)


def trained_model(folder: Path, pattern: str = "bmojo,mamba2,bmojo_f") -> TrainedModel:
    """What load_trained gives, with a run directory in `folder`, and the files of its train stage."""
    config = {"tracking": {"uri": None, "experiment": "tests"}}
    run = made_run(open_storage(folder / "runs"), "tiny-00000000", config)
    model, tokenizer = tiny_model(pattern), tiny_tokenizer()
    save_pretrained(model, folder / "train" / "model")
    tokenizer.save(folder / "tokens" / "tokenizer")
    return TrainedModel(run, "train", model, tokenizer)
