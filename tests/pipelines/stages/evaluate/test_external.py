"""Models from elsewhere: an export of ours, and a model of transformers, in a folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import DamagedError, UserError
from benchmarks.zero_shot import Pair, small_pair
from data.errors import SourceUnavailableError
from pipelines.stages.evaluate.continuations import Continuation, score_continuations, score_texts
from pipelines.stages.evaluate.external import ExternalModelConfig, fetch
from pipelines.stages.evaluate.external_model import (
    TransformersModel,
    load_external_model,
    load_external_tokenizer,
)
from pipelines.stages.evaluate.harness.lm import HarnessLM
from pipelines.stages.evaluate.language_model import Drawing, NativeModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return small_pair(tmp_path_factory.mktemp("external"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    """A tiny random GPT-2, with a tokenizer that puts nothing before a text."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).eval().save_pretrained(folder)
    pair.tokenizer.save(folder / "plain")
    AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(folder)
    return folder


def external(folder: Path, revision: str | None = None) -> ExternalModelConfig:
    return ExternalModelConfig(kind="hf", name=str(folder), revision=revision)


def test_an_export_is_loaded_by_this_program_with_its_tokenizer(pair: Pair) -> None:
    config = external(pair.exported)
    folder = fetch(config, config.version())
    model, tokenizer = load_external_model(folder, on_gpu=False), load_external_tokenizer(folder)
    assert isinstance(model, NativeModel)
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), pair.model.parameters(), strict=True))
    text = "The sky is green. <|endoftext|> \u00fc"
    assert np.array_equal(tokenizer.encode_batch([text])[0], pair.tokenizer.encode_batch([text])[0])
    assert tokenizer.start_ids == (pair.tokenizer.eod_id,)


def test_code_in_an_export_is_not_run(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pair.exported, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    model = load_external_model(folder, on_gpu=False)
    assert isinstance(model, NativeModel)


def test_a_model_of_transformers_scores_as_its_own_code_does(gpt2: Path) -> None:
    model, tokenizer = load_external_model(gpt2, on_gpu=False), load_external_tokenizer(gpt2)
    assert isinstance(model, TransformersModel)
    assert model.max_tokens == 64
    assert tokenizer.start_ids == ()
    context, ids = ([5, 6, 7], [8, 9])
    with torch.no_grad():
        logprobs = model.module(torch.tensor([context + ids])).logits[0].log_softmax(-1)
    want = float(logprobs[2, 8] + logprobs[3, 9])
    others = [Continuation([1] * n, [2, 3]) for n in range(1, 9)]
    got = score_continuations(model, [*others, Continuation(context, ids)], batch_tokens=30)[-1]
    assert got.logprob == pytest.approx(want, abs=1e-4)
    assert score_texts(model, [Continuation(context[:1], context[1:] + ids)], 30)[0] < want


def test_generation_with_padding_is_that_of_each_prompt_alone(gpt2: Path) -> None:
    model, tokenizer = load_external_model(gpt2, on_gpu=False), load_external_tokenizer(gpt2)
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    width = max(map(len, prompts))
    prompt_bt = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    valid_bt = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    both = torch.stack(list(model.generate(prompt_bt, Drawing(6, temperature=0), valid_bt=valid_bt)), 1)
    for row, ids in zip(both, prompts, strict=True):
        alone = torch.stack(list(model.generate(torch.tensor([ids]), Drawing(6, temperature=0))), 1)
        assert torch.equal(row, alone[0])
    assert HarnessLM(model, tokenizer, 64).prefix_token_id == tokenizer.eod_id


def test_a_native_model_generates_through_the_same_protocol(pair: Pair) -> None:
    from lm_eval.api.instance import Instance

    lm = HarnessLM(NativeModel(pair.model), pair.tokenizer, batch_tokens=64)
    prompts = ["The sky is", "A", "Question: why is water wet? Answer:"]
    requests = [Instance("generate_until", {}, (prompt, {"until": ["e"], "max_gen_toks": 20}), 0) for prompt in prompts]
    together = lm.generate_until(requests)
    assert together == [lm.generate_until([request])[0] for request in requests]
    assert all("e" not in text for text in together)


def test_models_that_need_code_of_their_own_are_refused(gpt2: Path, tmp_path: Path) -> None:
    settings = {"model_type": "peculiar", "auto_map": {"AutoModelForCausalLM": "peculiar.Peculiar"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "peculiar.py").write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(UserError, match="code that comes with a model is never run"):
        load_external_model(tmp_path, on_gpu=False)


def test_weights_that_are_missing_are_no_random_numbers(gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(gpt2, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing or of another shape, among them transformer\.h\.1"):
        load_external_model(folder, on_gpu=False)


def test_pickled_weights_are_refused(gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "copy"
    shutil.copytree(gpt2, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_external_model(folder, on_gpu=False)


def test_a_damaged_export_is_said_to_be_damaged(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pair.exported, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamagedError, match="Export the model again"):
        load_external_model(folder, on_gpu=False)


def test_the_version_changes_with_the_files_and_what_changed_is_not_loaded(gpt2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(gpt2, folder)
    config = external(folder)
    version = config.version()
    assert fetch(config, version) == folder
    (folder / "generation_config.json").write_text("{}")
    assert config.version() != version
    with pytest.raises(UserError, match="its files have changed since the run was planned"):
        fetch(config, version)


def test_names_that_are_nothing_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert external(Path("someone/model"), COMMIT).version() == COMMIT, "a commit needs no question"
    with pytest.raises(UserError, match=r"holds no config\.json"):
        external(tmp_path).version()
    with pytest.raises(UserError, match="there is no such folder"):
        external(tmp_path / "nowhere").version()

    class Hub:
        def model_info(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(SourceUnavailableError, match="run again later"):
        external(Path("someone/model")).version()


def test_windows_of_a_long_text_score_every_token_once(gpt2: Path) -> None:
    """A text beyond the model's limit: as one window where it fits, as lm-eval's rolling windows where it does not."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = load_external_model(gpt2, on_gpu=False)
    ids = torch.randint(1, 300, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    got = score_texts(model, [Continuation([0], ids)], 200, max_tokens=64)[0]
    windows = map(make_disjoint_window, get_rolling_token_windows(ids, 0, 64, 1))
    want = sum(
        score.logprob for score in score_continuations(model, [Continuation(*pair) for pair in windows], 200, 64)
    )
    assert got == pytest.approx(want, abs=1e-3)
    assert math.isfinite(got)
