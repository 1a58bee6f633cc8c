"""The report shows every figure it is given, in HTML and in Markdown, whatever the text holds."""

from __future__ import annotations

import dataclasses

import pytest

from pipelines.stages.evaluate.results import SampleText
from pipelines.stages.evaluate.section import EvaluatedModel
from pipelines.stages.report.page import StageSummary, build_report
from pipelines.stages.train.stage import TrainOutput
from tests.pipelines.stages.evaluate.results import EVALUATION, SAMPLES, TEXT, output

TRAINING = TrainOutput(
    model="model", history="history.json", tokenizer="tokenizer", seq_len=512, vocab_size=8192, num_params=4_200_000,
    steps=100, tokens_seen=3_000_000, final_train_loss=4.0, initial_valid_loss=9.0, final_valid_loss=4.1,
    train_time_s=300.0, tokens_per_s=9876.5, mfu=0.41,
)  # fmt: skip
MODEL = EvaluatedModel(
    name="train",
    pattern="bmojo*4",
    training=TRAINING,
    evaluation=EVALUATION,
    history={"train/loss": [(1, 8.0), (100, 4.0)], "valid/loss": [(100, 4.1)], "train/lr": [(1, 1e-3), (100, 1e-4)]},
)
STAGE = StageSummary("train", "train", "0123456789abcdef", {"kind": "train", "lr": 0.003})


def with_sample(prompt: str, text: str) -> EvaluatedModel:
    samples = SAMPLES.model_copy(update={"samples": (SampleText(prompt=prompt, text=text),)})
    return dataclasses.replace(MODEL, evaluation=output(TEXT, samples))


def test_every_figure_is_in_both_formats() -> None:
    report = build_report("Quickstart", "written today", [MODEL.section()], [STAGE])
    for text in (report.html, report.markdown):
        for figure in (
            "4.20 M",
            "3.00 M",
            "3.21 \u00b1 0.11",
            "24.8 (22.2 to 27.7)",
            "1.456 \u00b1 0.052",
            "3.789",
            "2.111",
            "9,876",
            "41%",
            "bmojo*4",
            "01234567",
            "0.003",
        ):
            assert figure in text, figure
    for name, png in report.pictures.items():
        assert png.startswith(b"\x89PNG"), name
        assert f"]({name})" in report.markdown
    assert set(report.pictures) == {"bits_per_byte.png", "loss.png", "lr.png", "perplexity_by_position.png"}


def test_what_the_data_is_stands_on_the_page() -> None:
    model = dataclasses.replace(MODEL, data=["tokens: 12 documents; left out: 3 empty & 1 <other>."])
    report = build_report("Quickstart", "", [model.section()], [STAGE])
    assert "## Data\n\ntokens: 12 documents; left out: 3 empty & 1 <other>.\n" in report.markdown
    assert "<h2>Data</h2>\n<p>tokens: 12 documents; left out: 3 empty &amp; 1 &lt;other&gt;.</p>" in report.html
    assert "Data" not in build_report("Quickstart", "", [MODEL.section()], [STAGE]).markdown


def test_generated_text_cannot_break_the_page() -> None:
    evil = with_sample("<b>", "</pre><script>alert(1)</script> ``` # not a heading")
    report = build_report("Quickstart", "", [evil.section()], [STAGE])
    assert "<script>" not in report.html
    assert "&lt;script&gt;" in report.html
    assert "````text\n" in report.markdown  # a longer fence than any inside


def test_models_without_baselines_or_long_documents_are_reported_too() -> None:
    evaluation = output(TEXT.model_copy(update={"references": ()}))
    bare = dataclasses.replace(MODEL, name="other", evaluation=evaluation, history={})
    report = build_report("Two", "", [MODEL.section(), bare.section()], [STAGE])
    assert "other" in report.html
    assert "perplexity_by_position.png" in report.pictures


def test_a_report_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        build_report("Empty", "", [], [])


def test_control_characters_of_generated_text_are_pictures() -> None:
    noisy = with_sample("a\0b", "c\x1b[31m\td\x7f\x85\ne")
    report = build_report("Quickstart", "", [noisy.section()], [STAGE])
    for text in (report.html, report.markdown):
        assert "a\u2400b" in text
        assert "c\u241b[31m\td\u2421\ufffd\ne" in text
        assert not set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) & set(text)
