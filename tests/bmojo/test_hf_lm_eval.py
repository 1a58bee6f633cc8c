"""lm-eval's `hf` model type on an exported directory, with a task of our own and no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.hf import export_to_hf
from data.config import PythonStdlibSource, TokenizerFields
from data.tokenizer import Tokenizer, train_tokenizer

QUESTIONS = [("The sky is", "blue", "green"), ("A very much longer question about grass, which is", "green", "red")]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
GENERATE_TASK = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{good}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[BMojoLM, Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("lm_eval")
    source = TokenizerFields(source=PythonStdlibSource(kind="python_stdlib"), vocab_size=280)
    tokenizer = train_tokenizer(["The sky is blue. The grass is green."] * 3, source)
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig(
        pattern="bmojo,mamba2", vocab_size=320, d_model=32, num_heads=2, window_size=8, chunk_size=4, num_eidetic=4,
        d_state=8, ssm_head_dim=16, init_std=0.1,
    )  # fmt: skip
    model = BMojoLM(config).eval()
    export_to_hf(model, folder / "tokenizer" / "tokenizer.json", folder / "model")
    return model, tokenizer, folder


@pytest.mark.ci
@pytest.mark.usefixtures("hf_modules_cache")
def test_lm_eval_scores_and_generates_as_our_model_does(exported, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    model, tokenizer, folder = exported
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    rows = [{"question": question, "good": good, "bad": bad} for question, good, bad in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, text in (("tiny_choice", CHOICE_TASK), ("tiny_generate", GENERATE_TASK)):
        (tasks / f"{name}.yaml").write_text(text.format(file=folder / "questions.jsonl"))

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), "trust_remote_code": True, "dtype": "float32"},
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )

    for sample, (question, good, bad) in zip(results["samples"]["tiny_choice"], QUESTIONS, strict=True):
        got = [float(response[0][0]) for response in sample["resps"]]
        start = [tokenizer.eod_id]  # which the exported tokenizer puts before a text by itself
        want = [continuation_score(model, tokenizer, question, f" {answer}", start) for answer in (good, bad)]
        assert got == pytest.approx(want, abs=1e-3)
    assert all(isinstance(sample["resps"][0][0], str) for sample in results["samples"]["tiny_generate"])
    assert set(results["results"]) == {"tiny_choice", "tiny_generate"}


@pytest.mark.usefixtures("hf_modules_cache")
def test_lm_eval_puts_the_document_start_before_a_text_or_leaves_it_out_as_told(exported):
    """add_bos_token=True: as documents began in training. False: a text is scored as if cut out of a document."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, folder = exported
    question, good, _ = QUESTIONS[0]
    request = Instance("loglikelihood", {}, (question, f" {good}"), 0)
    scores = []
    for add_bos_token in (False, True):
        lm = HFLM(
            pretrained=str(folder / "model"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=1,
            add_bos_token=add_bos_token,
        )  # fmt: skip
        ((score, _),) = lm.loglikelihood([request], disable_tqdm=True)
        scores.append(score)
    start = [tokenizer.eod_id]
    want = [continuation_score(model, tokenizer, question, f" {good}", before) for before in ([], start)]
    assert scores == pytest.approx(want, abs=1e-3)
    assert abs(want[0] - want[1]) > 0.01


@torch.no_grad()
def continuation_score(
    model: BMojoLM, tokenizer: Tokenizer, context: str, continuation: str, before: Sequence[int] = ()
) -> float:
    """Sum of log-probabilities of the continuation's tokens; `before` holds ids ahead of the context."""
    texts = (context, context + continuation)
    context_ids, ids = ([*before, *tokenizer.encode_batch([text])[0].tolist()] for text in texts)
    log_probs = model(torch.tensor([ids[:-1]])).logits_btv[0].log_softmax(-1)
    positions = range(len(context_ids), len(ids))
    return float(sum(log_probs[position - 1, ids[position]] for position in positions))
