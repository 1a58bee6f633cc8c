"""A model directory as transformers expects it, and back. Needs no transformers.

config.json, generation_config.json      configuration, with auto_map naming the classes below
model.safetensors                        weights, `model.` before the names of BMojoLM
modeling_bmojo.py, configuration_bmojo.py, bmojo_*.py, kernels_*.py    the model's source (bmojo.hf.bundle)
tokenizer.json, tokenizer_config.json    the tokenizer
README.md                                how to load it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bmojo.config import ModelConfig
from bmojo.hf.bundle import bundled_sources
from bmojo.model import BMojoLM
from bmojo.tensor_file import save_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PREFIX = "model."

README = """---
library_name: transformers
pipeline_tag: text-generation
---
# B'MOJO language model

Layers: `{pattern}`; {num_params:,} parameters; vocabulary {vocab_size:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)  # or transformers 5 asks
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

A document began with the end-of-document token in training, and the tokenizer puts it before every text unless
`add_special_tokens=False` says otherwise. lm-eval needs it too, or the model is scored on documents without a
beginning: `--model_args pretrained=DIRECTORY,trust_remote_code=True,add_bos_token=True` (0.4.13 does so by itself).

Needs transformers (tested with 4.57 and 5.24), torch, safetensors and pydantic. Rows of several documents: pass
`position_ids` that restart, or `doc_ids`. Fine-tuning with Trainer: `optimizers=(AdamW(model.param_groups(0.1)), None)`
decays matrices only, as in pretraining. The state kept while decoding has a constant size unless there are layers
of full attention, so there is no limit on the length of a text; `num_eidetic` in config.json may be raised to remember
more.
"""


def export_to_hf(model: BMojoLM, tokenizer_json: str | Path, directory: str | Path) -> None:
    """Write a directory for AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).

    Args:
        tokenizer_json: the tokenizer.json of Hugging Face tokenizers; a tokenizer_config.json beside it says which
            token ends a document.
        directory: new or empty.
    Raises: FileNotFoundError: no tokenizer there. FileExistsError: the directory holds something.
    """
    tokenizer_json, directory = Path(tokenizer_json), Path(directory)
    if not tokenizer_json.is_file():
        raise FileNotFoundError(f"{tokenizer_json}: there is no such file; expected a tokenizer.json.")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    special, num_token_ids = _copy_tokenizer(tokenizer_json, directory)
    dtype = str(model.dtype).removeprefix("torch.")
    _write_json(directory / CONFIG, _config(model.config, special, dtype))
    assert model.config.vocab_size is not None
    padding_ids = list(range(num_token_ids, model.config.vocab_size))  # rows that pad the vocabulary, no tokens
    generation = {"use_cache": True, **({"suppress_tokens": padding_ids} if padding_ids else {}), **special}
    _write_json(directory / "generation_config.json", generation)
    tensors = {PREFIX + name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop(PREFIX + "head.weight")
    for name, source in bundled_sources(model.config.mixers).items():
        (directory / name).write_text(source, encoding="utf-8")
    num_params = sum(parameter.numel() for parameter in model.parameters())
    readme = README.format(pattern=model.config.pattern, num_params=num_params, vocab_size=model.config.vocab_size)
    (directory / "README.md").write_text(readme, encoding="utf-8")
    save_tensors(tensors, directory / WEIGHTS)


def import_from_hf(directory: str | Path, device: torch.device | str = "cpu") -> BMojoLM:
    """The model of a directory that export_to_hf, or save_pretrained of a model loaded from one, wrote.

    Raises: FileNotFoundError: no model there. ValueError: it is of another kind, or weights and config do not fit.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; expected an exported model.")
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    if config.get("model_type") != "bmojo":
        found = config.get("model_type", "without model_type")
        raise ValueError(f"{directory / CONFIG}: a model {found}; only models of type bmojo can be imported.")
    fields = {name: config[name] for name in ModelConfig.model_fields if name in config}
    tensors = {name.removeprefix(PREFIX): x for name, x in _read_weights(directory, str(device)).items()}
    if "embedding.weight" not in tensors:
        raise ValueError(f"{directory}: the weights lack embedding.weight. Export the model again.")
    if "head.weight" not in tensors and fields.get("tie_embeddings", True):
        tensors["head.weight"] = tensors["embedding.weight"]
    with torch.device(device):
        model = BMojoLM(ModelConfig.model_validate(fields))
    model = model.to(tensors["embedding.weight"].dtype)
    for name, parameter in model.named_parameters():  # SSM parameters may be stored in float32 beside bfloat16
        if name in tensors:
            parameter.data = parameter.data.to(tensors[name].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{directory}: the weights do not fit {CONFIG}: {error}") from error
    return model


def _config(model: ModelConfig, special: dict[str, int], dtype: str) -> dict[str, Any]:
    classes = {
        "AutoConfig": "configuration_bmojo.BMojoConfig",
        "AutoModel": "modeling_bmojo.BMojoModel",
        "AutoModelForCausalLM": "modeling_bmojo.BMojoForCausalLM",
    }
    return {
        "model_type": "bmojo", "architectures": ["BMojoForCausalLM"], "auto_map": classes, "dtype": dtype, **special,
        **model.model_dump(mode="json"),
    }  # fmt: skip


def _copy_tokenizer(tokenizer_json: Path, directory: Path) -> tuple[dict[str, int], int]:
    """Write the tokenizer's files; returns the ids of its special tokens as config.json names them, and how many ids
    there are."""
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    beside = tokenizer_json.with_name(TOKENIZER_CONFIG)
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    end = config.get("eos_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **config,
    }  # fmt: skip
    special = {}
    if end is not None:
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        config = {"bos_token": end, "pad_token": end, "padding_side": "left", "add_bos_token": True, **config}
        special = {f"{role}_token_id": added[config[f"{role}_token"]] for role in ("bos", "eos", "pad")}
        spec["post_processor"] = _document_start(config["bos_token"], special["bos_token_id"])
    _write_json(directory / TOKENIZER, spec)
    _write_json(directory / TOKENIZER_CONFIG, config)
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
    return special, max(ids) + 1


def _document_start(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts the token before a text, as every document began in training."""
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _read_weights(directory: Path, device: str) -> dict[str, torch.Tensor]:
    files = [WEIGHTS]
    if (directory / INDEX).is_file():
        files = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; expected an exported model.")
        try:
            tensors |= load_file(directory / name, device=device)
        except SafetensorError as error:
            raise ValueError(
                f"{directory / name} is damaged: {error}. Copy it again, or export the model again."
            ) from error
    return tensors


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
