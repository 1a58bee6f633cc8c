"""`bmojo inspect`: what is found, how it is drawn, and what is said when there is nothing to find."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.inspection import inspect_memory, kept_tokens
from pipelines.cli.inspect import inspect
from pipelines.inspection.draw import draw_inspection
from pipelines.inspection.plots import COLUMNS, strip_lines
from pipelines.inspection.text import shown_at, token_pieces
from tests.pipelines.stages.trained_run import TEXT, tiny_model, tiny_tokenizer, trained_model

app = typer.Typer()
app.command()(inspect)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = trained_model(tmp_path)
    monkeypatch.setattr("pipelines.cli.inspect.load_trained", lambda storage, run, stage: found)
    (tmp_path / "text.py").write_text(TEXT, encoding="utf-8")
    return found


def test_entries_and_exits_of_kept_positions_are_followed():
    sets = torch.tensor([[-1, -1], [3, -1], [5, 3], [5, 9]])
    kept = kept_tokens(sets, chunk_size=4)
    assert [(token.position, token.entered, token.dropped) for token in kept] == [
        (3, 4, 12),
        (5, 8, None),
        (9, 12, None),
    ]


def test_inspection_finds_the_highest_scores_that_left_the_window():
    model, tokens = tiny_model(), torch.randint(0, 300, (101,), generator=torch.Generator().manual_seed(0))
    bmojo, bmojo_f = inspect_memory(model, tokens)
    assert (bmojo.layer, bmojo.mixer, bmojo_f.layer, bmojo_f.mixer) == (1, "bmojo", 3, "bmojo_f")
    assert bmojo.innovation_t is not None
    last_update = 100 // 8 * 8
    best = bmojo.innovation_t[: last_update - 16 + 1].topk(4).indices
    assert {token.position for token in bmojo.kept_at_end} == set(best.tolist())
    assert all(token.entered >= token.position + 16 for token in bmojo.kept)
    assert bmojo_f.innovation_t is None
    assert not bmojo_f.kept
    for layer in (bmojo, bmojo_f):
        assert sum(layer.mean_mass) == pytest.approx(1, abs=1e-4)
    assert bmojo_f.mean_mass[2] == 0


def test_rules_side_by_side_are_what_models_with_these_rules_keep_in_their_first_layer():
    """The first layer's inputs do not depend on the rule, so a model with the rule keeps what is said of it."""
    tokens = torch.randint(0, 300, (101,), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    (layer, without) = inspect_memory(model, tokens, threshold=1.45)
    assert [rule.rule for rule in layer.rules] == [
        "innovation", "delta_error", "threshold", "recency", "value_norm", "random"
    ]  # fmt: skip
    assert not without.rules
    assert {*layer.rules[0].positions} == {token.position for token in layer.kept_at_end}
    for rule in layer.rules:
        threshold = 1.45 if rule.rule == "threshold" else None
        other = BMojoLM(model.config.replace(selection=rule.rule, selection_threshold=threshold))
        other.load_state_dict(model.state_dict())
        kept = other(tokens[None], return_memory=True).memory[0].kept_position_bjm[0, -1].tolist()
        assert rule.positions == tuple(position for position in kept if position >= 0)
    assert len({rule.positions for rule in layer.rules}) == len(layer.rules)


def test_page_has_a_table_of_the_rules():
    drawn = draw_inspection(tiny_model(), tiny_tokenizer(), TEXT, 4096, "title", "about")
    (table,) = re.findall(r"<table>(.*?)</table>", drawn.html, re.DOTALL)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr")[2:]]
    assert [row[0] for row in rows][:2] == ["innovation", "delta_error"]
    for number, row in enumerate(rows):
        assert row[1] == row[2 + number]  # a rule shares all of its tokens with itself
        assert [other[2 + number] for other in rows] == row[2 : 2 + len(rows)]  # and as many as the other with it


def test_pieces_join_to_the_text():
    tokenizer = tiny_tokenizer()
    text = "naïve ☕ 🙂\n日本"
    pieces = token_pieces(tokenizer, [tokenizer.eod_id, *tokenizer.encode_batch([text])[0].tolist()])
    assert pieces[0] == "<|endoftext|>"
    assert "".join(pieces[1:]) == text


def test_tokens_of_one_character_show_together():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_batch(["a─b"])[0].tolist()
    pieces = token_pieces(tokenizer, ids)
    assert (len(ids), pieces[0], pieces[-2:]) == (5, "a", ["─", "b"])
    assert shown_at(pieces) == [0, 3, 3, 3, 4]
    assert token_pieces(tokenizer, ids[:2]) == ["a", "\ufffd"]


def test_page_shows_the_text_once_a_layer_with_its_kept_tokens_marked():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = TEXT + "<script>alert('&')</script>\n"
    drawn = draw_inspection(model, tokenizer, text, 4096, "A <title>", "about")
    (strip,) = re.findall(r'<div class="strip">(.*?)</div>', drawn.html, re.DOTALL)
    shown = unescape(re.sub("<[^>]+>", "", strip))
    assert shown.replace("↵", "") == "<|endoftext|>" + text
    assert len(re.findall(r'class="s\d kept"', strip)) == 4
    assert "kept since token" in strip
    assert "<script>" not in drawn.html
    assert "A &lt;title&gt;" in drawn.html
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", drawn.html)  # needs nothing else
    assert drawn.png.startswith(b"\x89PNG")
    assert len(drawn.summary) == 2


def test_strip_wraps_and_keeps_every_character():
    pieces = ["ab\n", "\tx" * 90, "\n\n", "end"]
    lines = strip_lines(pieces)
    assert max(column + len(text) for line in lines for _, column, text in line) <= COLUMNS
    joined = "".join(text for line in lines for _, _, text in line)
    assert joined == "".join(pieces).replace("\t", "    ").replace("\n", "↵")


@pytest.mark.ci
def test_command_writes_page_and_picture_and_logs_them_to_mlflow(trained, tmp_path):
    import mlflow

    from pipelines.tracking.mlflow.target import MlflowConfig

    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["tiny", "--text", str(tmp_path / "text.py"), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == ["inspection.html", "inspection.png"]
    assert "layer 1 (bmojo)" in result.output
    assert "warning" not in result.output
    target = MlflowConfig(experiment="tests").target(trained.run.storage)
    client = mlflow.MlflowClient(target.uri)
    experiment = client.get_experiment_by_name("tests")
    (logged,) = client.search_runs([experiment.experiment_id], "tags.`bmojo.run_id` = 'tiny-00000000'")
    names = [file.path for file in client.list_artifacts(logged.info.run_id, "inspect-text")]
    assert names == ["inspect-text/inspection.html", "inspect-text/inspection.png"]


def test_trouble_with_mlflow_is_only_a_warning(trained, tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("pipelines.inspection.publish._publish", broken)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["tiny", "--text", str(tmp_path / "text.py"), "--output", str(out)])
    assert result.exit_code == 0
    assert "no server" in result.output
    assert (out / "inspection.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b" \n", "no text"), (b"ab\xff\xfe", "byte 2 is not UTF-8"), (b"short", "window_size is 16"),
     (None, "No such file")],
)  # fmt: skip
def test_bad_texts_are_refused_and_nothing_is_written(trained, tmp_path, content, message):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["tiny", "--text", str(file), "--output", str(out)])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not out.exists()


def test_a_model_without_such_memories_is_refused():
    with pytest.raises(UserError, match=r"layers of this model are swa\*2"):
        draw_inspection(tiny_model("swa*2"), tiny_tokenizer(), TEXT, 4096, "", "")


def test_long_texts_are_cut_and_it_is_said():
    drawn = draw_inspection(tiny_model(), tiny_tokenizer(), TEXT, 60, "", "")
    assert "Only the first 60 of" in drawn.html
