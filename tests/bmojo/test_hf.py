"""Hugging Face: an exported directory gives the same model, with and without our package at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch

from bmojo import BMojoLM, ModelConfig
from bmojo.generation import generate
from bmojo.hf import export_to_hf, import_from_hf
from bmojo.hf.bundle import bundled_sources
from bmojo.mixers import MIXERS
from data.config import PythonStdlibSource, TokenizerFields
from data.tokenizer import train_tokenizer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("hf_modules_cache")

PATTERN = "(bmojo,mamba2,bmojo_f,swa)"
OTHERS = [f"{name}*2" for name in MIXERS if name not in ("bmojo", "bmojo_f", "swa")]
NUM_TOKEN_IDS = 293  # of the tokenizer below; the model's vocabulary is padded
TEXTS = ["def f(x):\n    return x + 1\n", "import os\n\nclass A:\n    pass\n" * 3, "x = 1\n"]


def make_model(pattern: str = PATTERN, **changes: object) -> BMojoLM:
    config = ModelConfig.model_validate(
        {"pattern": pattern, "vocab_size": 320, "d_model": 32, "num_heads": 2, "num_kv_heads": 1, "window_size": 8,
         "chunk_size": 4, "num_eidetic": 4, "d_state": 8, "ssm_head_dim": 16, **changes}
    )  # fmt: skip
    model = BMojoLM(config)
    with torch.no_grad():  # away from the symmetric start, so that logits differ clearly
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TokenizerFields(source=PythonStdlibSource(kind="python_stdlib"), vocab_size=300)).save(
        folder
    )
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> tuple[BMojoLM, Path]:
    model = make_model()
    directory = tmp_path_factory.mktemp("hf") / "tiny-bmojo"
    export_to_hf(model, tokenizer_json, directory)
    return model, directory


@pytest.fixture(scope="module")
def loaded(exported: tuple[BMojoLM, Path], hf_modules_cache: None):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 320, (2, 37), generator=torch.Generator().manual_seed(1))


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        fill = [0] * (width - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill))
    return torch.tensor(ids), torch.tensor(mask)


def test_loaded_model_gives_the_same_logits(exported, loaded, tokens):
    torch.testing.assert_close(loaded(tokens).logits, exported[0](tokens).logits_btv, rtol=1e-5, atol=1e-5)
    assert type(loaded).__module__.startswith("transformers_modules.")


def test_loss_is_the_models_own_in_training_and_evaluation(exported, loaded, tokens):
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    want = exported[0](tokens, targets).loss
    torch.testing.assert_close(loaded(tokens, labels=tokens).loss, want, rtol=1e-5, atol=1e-5)
    loaded.train()
    try:
        output = loaded(tokens, labels=tokens)
    finally:
        loaded.eval()
    torch.testing.assert_close(output.loss, want, rtol=1e-5, atol=1e-5)
    assert output.logits is None
    output.loss.backward()
    loaded.zero_grad()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits_and_no_loss(loaded, tokens, side):
    rows = [tokens[0, :37].tolist(), tokens[1, :22].tolist()]
    ids, mask = padded(rows, side)
    output = loaded(ids, attention_mask=mask)
    for row, alone in enumerate(rows):
        want = loaded(torch.tensor([alone])).logits[0]
        torch.testing.assert_close(output.logits[row][mask[row].bool()], want, rtol=1e-5, atol=1e-5)
    labels = ids.masked_fill(mask == 0, -100)
    sums = [loaded(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    want_loss = sum(sums) / sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(loaded(ids, attention_mask=mask, labels=labels).loss, want_loss)


def test_padding_between_tokens_is_refused(loaded, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="not between tokens"):
        loaded(tokens, attention_mask=mask)


def test_generate_continues_as_our_own_generation_does(exported, loaded, tokens):
    want = torch.stack(list(generate(exported[0], tokens, 20, temperature=0, num_token_ids=NUM_TOKEN_IDS)), 1)
    got = loaded.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(got[:, tokens.shape[1] :], want)


def test_generate_with_left_padding_equals_each_row_alone(loaded, tokens):
    rows = [tokens[0, :30].tolist(), tokens[1, :11].tolist()]
    ids, mask = padded(rows, "left")
    got = loaded.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row, alone in enumerate(rows):
        want = loaded.generate(torch.tensor([alone]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert got[row, -12:].tolist() == want[0, -12:].tolist()


def test_sampling_beams_and_several_sequences_run(loaded, tokens):
    torch.manual_seed(0)
    sampled = loaded.generate(tokens, max_new_tokens=5, do_sample=True, top_k=50, num_return_sequences=2)
    assert sampled.shape[0] == 4
    beams = loaded.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
    assert beams.shape == (2, tokens.shape[1] + 5)


def test_cache_has_a_constant_size_and_carries_on(loaded, tokens):
    first = loaded(tokens[:, :20], use_cache=True, logits_to_keep=1)
    size = first.past_key_values.num_bytes()
    rest = loaded(tokens[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, loaded(tokens).logits[:, 20:], rtol=1e-4, atol=1e-5)
    assert rest.past_key_values.num_bytes() == size
    assert rest.past_key_values.get_seq_length() == tokens.shape[1]


def test_generation_without_cache_agrees(loaded, tokens):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(tokens, use_cache=False, **options), loaded.generate(tokens, **options))


def test_eidetic_slots_can_be_raised_on_loading(exported, tokens):
    from transformers import AutoModelForCausalLM

    more = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True, num_eidetic=16).eval()
    want = import_from_hf(exported[1])
    wider = BMojoLM(want.config.replace(num_eidetic=16))
    wider.load_state_dict(want.state_dict())
    torch.testing.assert_close(more(tokens).logits, wider.eval()(tokens).logits_btv, rtol=1e-5, atol=1e-5)


def test_ssm_parameters_stay_float32_in_bfloat16(exported, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=True, dtype=torch.bfloat16).eval()
    kept = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())
    want = exported[0](tokens).logits_btv
    assert (logits.float() - want).norm() / want.norm() < 0.1
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 40


@pytest.mark.ci
@pytest.mark.parametrize(("pattern", "tied"), zip(OTHERS, cycle([True, False])))
def test_other_members_of_the_family_survive_the_round_trip(tmp_path, tokenizer_json, tokens, pattern, tied):
    check_round_trip(make_model(pattern, tie_embeddings=tied), tokenizer_json, tmp_path / "out", tokens)


def test_another_fading_memory_and_a_convolution_survive_the_round_trip(tmp_path, tokenizer_json, tokens):
    model = make_model("bmojo", attention_conv_width=4, fading_ssm="gated_deltanet")
    for name, parameter in model.named_parameters():
        if name.endswith("_conv.weight"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    check_round_trip(model, tokenizer_json, tmp_path / "out", tokens)


def check_round_trip(model: BMojoLM, tokenizer_json: Path, folder: Path, tokens: torch.Tensor) -> None:
    """The exported model has the logits and the answers of the model."""
    from transformers import AutoModelForCausalLM

    export_to_hf(model, tokenizer_json, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits_btv, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    want = torch.stack(list(generate(model, tokens, 4, 0, num_token_ids=NUM_TOKEN_IDS)), 1)
    assert torch.equal(loaded.generate(tokens, **options)[:, -4:], want)


def test_import_gives_equal_weights_and_config(exported):
    model, directory = exported
    back = import_from_hf(directory)
    assert back.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_model_saved_by_transformers_can_be_imported_and_loaded_again(exported, loaded, tmp_path, tokens):
    from transformers import AutoModelForCausalLM

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(import_from_hf(tmp_path / "again")(tokens).logits_btv, exported[0](tokens).logits_btv)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again.eval()(tokens).logits, loaded(tokens).logits)


def test_import_refuses_other_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        import_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="llama"):
        import_from_hf(tmp_path)


def test_export_refuses_a_directory_that_is_not_empty(tmp_path, tokenizer_json):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        export_to_hf(make_model("swa"), tokenizer_json, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        export_to_hf(make_model("swa"), tmp_path / "none" / "tokenizer.json", tmp_path / "new")


def test_an_exported_model_does_not_ask_for_triton(exported):
    """transformers refuses a model whose files import what is not installed; triton comes with GPUs only."""
    from transformers.dynamic_module_utils import get_imports

    files = list(exported[1].glob("*.py"))
    assert any("triton" in file.name for file in files)
    assert not [file.name for file in files if "triton" in get_imports(file)]


@pytest.mark.parametrize(
    ("pattern", "absent"),
    [
        ("mamba2", ("attention", "innovation", "eidetic", "selective_scan")),
        ("mamba,swa", ("ssd_scan", "mamba2", "innovation", "eidetic")),
    ],
)
def test_a_folder_holds_only_what_its_pattern_needs_and_loads(pattern, absent, tokenizer_json, tmp_path, tokens):
    from transformers import AutoModelForCausalLM

    model = make_model(pattern)
    export_to_hf(model, tokenizer_json, tmp_path / "folder")
    for file in (tmp_path / "folder").glob("*.py"):
        assert not any(part in file.name for part in absent)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits_btv, rtol=1e-5, atol=1e-5)


@pytest.mark.ci
def test_bundle_imports_nothing_of_ours_by_its_package():
    sources = bundled_sources(MIXERS)
    assert {"modeling_bmojo.py", "configuration_bmojo.py", "bmojo_model.py", "kernels_ssd_scan.py"} <= set(sources)
    for name, source in sources.items():
        for line in source.splitlines():
            assert not line.strip().startswith(("from bmojo", "import bmojo", "from kernels", "import kernels")), name


@pytest.mark.ci
def test_exported_directory_works_without_our_package(exported, tmp_path, tokens):
    """A fresh process, another working directory, our packages not importable."""
    script = """
import importlib.util, sys, torch
sys.path = [path for path in sys.path if path not in ("", ROOT)]
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("bmojo") is None and importlib.util.find_spec("kernels") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
inputs = tokenizer(["def f", "import os, sys"], return_tensors="pt", padding=True)
text = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=5, do_sample=False))
assert len(text) == 2 and text[1].startswith(tokenizer.bos_token + "import os, sys"), text
torch.save(model(torch.tensor(TOKENS)).logits, "logits.pt")
assert not any(name.partition(".")[0] in ("bmojo", "kernels") for name in sys.modules)
"""
    model, directory = exported
    root = str(Path(__file__).resolve().parents[2])
    values = f"ROOT = {root!r}\nDIRECTORY = {str(directory)!r}\nTOKENS = {tokens.tolist()!r}\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", values + script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, model(tokens).logits_btv, rtol=1e-5, atol=1e-5)


def test_tokenizer_loads_with_its_special_tokens(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == "<|endoftext|>" + TEXTS[1]
    assert tokenizer.decode(tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]) == TEXTS[1]
    config = json.loads((exported[1] / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id


def parity(python: Path, exported: tuple[BMojoLM, Path], tmp_path: Path) -> str:
    """Run hf_parity.py in an environment in which only the exported directory is known."""
    model, directory = exported
    prompts = torch.randint(0, NUM_TOKEN_IDS, (2, 23), generator=torch.Generator().manual_seed(5))
    greedy = torch.stack(list(generate(model, prompts, 200, temperature=0, num_token_ids=NUM_TOKEN_IDS)), 1)
    with torch.no_grad():
        logits = model(prompts).logits_btv
    facts = {"prompts": prompts, "greedy": greedy, "logits": logits}
    expected = {name: x.tolist() for name, x in facts.items()} | {"num_token_ids": NUM_TOKEN_IDS}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    script = tmp_path / "hf_parity.py"  # away from the checkout, whose packages must not be found
    script.write_text(Path(__file__).with_name("hf_parity.py").read_text())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", WITHOUT_OURS, script, directory, tmp_path / "expected.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WITHOUT_OURS = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_everything_transformers_users_do_works_on_this_version(exported, tmp_path):
    assert "ok on transformers 4." in parity(Path(sys.executable), exported, tmp_path)


@pytest.mark.slow
def test_everything_transformers_users_do_works_on_transformers_5(exported, tmp_path):
    python = Path(__file__).parents[2] / ".venv-transformers5" / "bin" / "python"
    assert python.exists(), "run `make transformers5`, which `make test-slow` does"
    assert "ok on transformers 5." in parity(python, exported, tmp_path)
