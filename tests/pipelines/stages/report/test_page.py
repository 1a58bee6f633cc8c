"""The page says everything it is given, in HTML, Markdown and JSON, whatever the texts hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from base.errors import UserError
from pipelines.stages.evaluate.results import Figure, MeasureResult, SampleText
from pipelines.stages.report.page import build_report
from pipelines.stages.sections import Section
from tests.pipelines.stages.report.made_up import content, models, section

HEADINGS = [
    "Results", "Comparison", "Measures", "Training", "Models", "Generated text", "Data", "Origin", "Configuration",
]  # fmt: skip


class Outline(HTMLParser):
    """Headings, ids, links within the page, and addresses that a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.inner: set[str] = set()
        self.fetched: list[str] = []
        self._in_heading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self._in_heading = tag == "h2"
        self.ids += [known["id"] or ""] if "id" in known else []
        if (known.get("href") or "").startswith("#"):
            self.inner.add((known["href"] or "")[1:])
        self.fetched += [known[name] or "" for name in ("src", "data", "srcset") if name in known]
        if tag in ("link", "iframe", "object", "embed"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def sampled(text: str, prompt: str = "") -> list[Section]:
    result = MeasureResult(
        name="samples", kind="samples", unit="document", num_units=1, figures=(Figure(name="loss", value=3.0),),
        samples=(SampleText(prompt=prompt, text=text),),
    )  # fmt: skip
    return [Section(subject="train", results=[result])]


def test_the_page_has_its_parts_in_order_and_contents_that_lead_to_them(tmp_path: Path) -> None:
    report = build_report(content(models(tmp_path, 3)))
    outline = Outline(report.html)
    assert outline.headings == HEADINGS
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.inner <= set(outline.ids)
    assert not outline.fetched  # one file that needs no other
    assert [head for head in re.findall(r"^## (.*)$", report.markdown, re.M) if head != "All figures"] == HEADINGS
    for name in re.findall(r"\]\(plots/(.*?)\)", report.markdown):
        assert report.pictures[name].startswith(b"\x89PNG")
        assert name.replace(".png", ".svg") in report.pictures


def test_a_single_model_is_not_compared(tmp_path: Path) -> None:
    report = build_report(content(models(tmp_path, 1)))
    assert "Comparison" not in Outline(report.html).headings
    assert "Δ" not in report.html
    assert "baseline" not in report.markdown
    assert not report.verdicts


def test_figures_have_intervals_and_differences_and_machines_get_all_digits(tmp_path: Path) -> None:
    sections = [section(tmp_path, "a", 3.2, recipe={"lr": 1}), section(tmp_path, "b", 3.6, recipe={"lr": 2})]
    report = build_report(content(sections, baseline="b"))
    rows = {(row["model"], row["figure"]): row for row in json.loads(report.json)["results"]}
    loss = rows["a", "loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    assert loss["delta_low"] < loss["delta"] < loss["delta_high"] < 0
    assert loss["is_best"]
    assert rows["b", "loss"]["is_baseline"]
    assert rows["b", "loss"]["delta"] is None
    shown = f"{loss['value']:.2f}"
    assert re.search(rf'<td data-key="{re.escape(str(loss["value"]))}" class="best">{shown}', report.html)
    assert re.search(rf"\| a \| {shown} \(\d\.\d\d to \d\.\d\d\) best \|", report.markdown)
    assert re.search(r"\| b baseline \|", report.markdown)


def test_an_unknown_baseline_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model 'c' to be the baseline. Models: train-bmojo, train-bmojo_f\."):
        build_report(content(models(tmp_path, 2), baseline="c"))


def test_a_seed_of_the_baseline_names_its_group(tmp_path: Path) -> None:
    report = build_report(content(models(tmp_path, 2, num_seeds=2), baseline="train-bmojo_f-1"))
    assert json.loads(report.json)["baseline"] == "train-bmojo_f"
    assert "train-bmojo_f (2 seeds)" in report.html


@pytest.mark.ci
def test_no_plot_has_more_than_eight_labels_nor_fails_at_twelve_models(tmp_path: Path) -> None:
    report = build_report(content(models(tmp_path, 12)))
    lines = ElementTree.fromstring(report.pictures["loss-training.svg"])
    texts = [node.text for node in lines.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(text in ("bmojo", "mamba2", "swa", "rwkv", "linear") for text in texts) <= 8
    assert "The best 8 of 12 models; the tables have all." in report.html
    assert all(f"train-{name}" in report.markdown for name in ("linear", "rwkv", "swa"))


@pytest.mark.ci
def test_equal_results_make_equal_pages(tmp_path: Path) -> None:
    one, other = (build_report(content(models(tmp_path, 2))) for _ in range(2))
    assert one == other


def test_texts_cannot_break_the_page() -> None:
    evil = "</pre><script>alert(1)</script> ``` # not a heading"
    report = build_report(
        content(
            [replace(one, subject="<b>|$x$", facts={"a|b": "<i>"}) for one in sampled(evil, "<b>")],
            title="<title>", about="& so",
        )
    )  # fmt: skip
    assert report.html.count("<script>") == 1  # that of the page
    assert "&lt;script&gt;" in report.html
    assert "<b>|" not in report.html
    assert "<i>" not in report.html
    assert "````text\n" in report.markdown  # a longer fence than any inside
    assert "a\\|b" in report.markdown


@pytest.mark.ci
def test_names_cannot_break_the_plots(tmp_path: Path) -> None:
    sections = [section(tmp_path, name, loss, recipe={"n": name}) for name, loss in (("<a&'\">", 3.2), ("$b$_", 3.3))]
    report = build_report(content(sections))
    for name, picture in report.pictures.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(picture)
    assert "<a&" not in report.html


def test_control_characters_are_pictures_and_gaps_are_folded() -> None:
    report = build_report(content(sampled("c\x1b[31m\td\x7f\x85\ne\n\n\n \n\n\nf\n\n\ng", "a\0b")))
    for text in (report.html, report.markdown):
        assert "a\u2400b" in text
        assert "c\u241b[31m\td\u2421\ufffd\ne" in text
        assert "e\n⋮ 5 empty lines\nf\n\n\ng" in text
        assert not set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) & set(text)


def test_a_report_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        build_report(content([]))


def test_figures_that_are_not_numbers_are_shown_as_such() -> None:
    figures = tuple(Figure(name=name, value=float(name), is_main=True) for name in ("nan", "inf"))
    result = MeasureResult(name="text", kind="text", unit="document", num_units=1, figures=figures)
    report = build_report(content([Section(subject=name, results=[result]) for name in ("a", "b")]))
    assert "NaN" in report.markdown
    assert "∞" in report.markdown
    assert [row["value"] for row in json.loads(report.json)["results"]] == ["NaN", "NaN", "Infinity", "Infinity"]
