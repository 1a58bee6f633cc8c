"""What an exported model must do under any transformers: run as `python hf_parity.py DIRECTORY EXPECTED.json`.

Nothing of ours is imported, as in the hands of someone who got the directory. EXPECTED.json holds what the native model
gives: {"prompts": [[ids]], "greedy": [[ids]], "logits": [[floats]], "num_token_ids": n}.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("bmojo") is None, "our packages must not be importable here"
CACHE = "cache" if int(transformers.__version__.partition(".")[0]) >= 5 else "past_key_values"
GREEDY = {"do_sample": False, "eos_token_id": None}


def check(directory: str, expected: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    prompts = torch.tensor(expected["prompts"])
    want = torch.tensor(expected["greedy"])
    torch.testing.assert_close(model(prompts).logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)

    def generated(ids: torch.Tensor, count: int, **options: object) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **{**GREEDY, **options})[
            :, ids.shape[1] :
        ]

    equal("greedy, as the native model", generated(prompts, want.shape[1]), want)
    for name in ("dynamic", "static"):
        equal(f"{name} cache", generated(prompts, 40, cache_implementation=name), want[:, :40])
    equal("without a cache", generated(prompts, 40, use_cache=False), want[:, :40])
    for name, options in {
        "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 40},
        "beams": {"num_beams": 4},
        "several sequences": {"do_sample": True, "num_return_sequences": 3},
    }.items():
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(generated(prompts, 24, use_cache=use_cache, **options))
        equal(f"{name}: cache and none", *results)
        assert int(results[0].max()) < expected["num_token_ids"], f"{name}: an id past the tokenizer was drawn"
    torch.manual_seed(0)
    hot = generated(prompts, 64, do_sample=True, temperature=50.0, top_k=0)
    assert int(hot.max()) < expected["num_token_ids"], "an id past the tokenizer was drawn"
    assert len(hot.unique()) > 30

    check_padding(model, prompts, want)
    check_turns(model, prompts, want)
    check_documents(model, prompts)
    check_interface(model, prompts)
    check_training(directory, prompts)
    check_tokenizer(directory)


def check_padding(model, prompts: torch.Tensor, want: torch.Tensor) -> None:
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
        for row, length in enumerate((20, 9)):
            place = slice(20 - length, 20) if side == "left" else slice(0, length)
            ids[row, place], mask[row, place] = prompts[row, :length], 1
        logits = model(ids, attention_mask=mask).logits
        for row, length in enumerate((20, 9)):
            alone = model(prompts[row : row + 1, :length])
            torch.testing.assert_close(logits[row][mask[row].bool()], alone.logits[0], rtol=1e-4, atol=1e-4)
        if side == "left":
            together = model.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY)[:, 20:]
            for row, length in enumerate((20, 9)):
                alone = model.generate(prompts[row : row + 1, :length], max_new_tokens=16, **GREEDY)[:, length:]
                equal("a padded row generates as it does alone", together[row : row + 1], alone)


def check_turns(model, prompts: torch.Tensor, want: torch.Tensor) -> None:
    """A cache that generate() returned goes on with the next turn, given as the whole text so far."""
    first = model.generate(prompts, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    cache = first[CACHE]
    size = cache.num_bytes()
    turn = torch.cat([first.sequences, prompts[:, :5]], 1)
    again = model.generate(turn, max_new_tokens=10, **{CACHE: cache}, **GREEDY)
    equal("a second turn", again, model.generate(turn, max_new_tokens=10, **GREEDY))
    assert cache.num_bytes() == size
    read = model(prompts[:, :7], use_cache=True)
    rest = model(prompts[:, 7:], **{CACHE: read[CACHE]})
    torch.testing.assert_close(rest.logits, model(prompts).logits[:, 7:], rtol=1e-4, atol=1e-4)


def check_documents(model, prompts: torch.Tensor) -> None:
    packed = torch.cat([prompts[0, :9], prompts[1, :14]])[None]
    alone = [model(prompts[:1, :9]), model(prompts[1:, :14])]
    want = torch.cat([output.logits[0] for output in alone])
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    index = torch.tensor([[0] * 9 + [1] * 14])
    ends = torch.tensor([0, 9, 23], dtype=torch.int32)
    forms = {
        "position_ids": {"position_ids": positions},
        "doc_ids": {"doc_ids": index},
        "seq_idx": {"seq_idx": index.int(), "position_ids": positions},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 14, "max_length_k": 14},
    }
    for name, given in forms.items():
        # The eidetic memory is updated where chunks begin, so documents agree with each alone up to there.
        found = model(packed, **given).logits[0]
        assert (found[:9] - want[:9]).abs().max() < 1e-4, name
        assert (found[9:13] - want[9:13]).abs().max() < 1e-4, name
        labels = model(packed, labels=packed, **given).loss
        leaky = model(packed, labels=packed).loss
        assert (labels - leaky).abs() > 1e-4, name
    changed = packed.clone()
    changed[0, :9] = (changed[0, :9] + 1) % 200
    other = model(changed, position_ids=positions).logits[0, 9:]
    torch.testing.assert_close(other, model(packed, position_ids=positions).logits[0, 9:], rtol=0, atol=0)
    refused("disagree", lambda: model(packed, position_ids=positions, doc_ids=torch.zeros_like(index)))
    refused("one document per row", lambda: model(packed, position_ids=positions, use_cache=True))


def check_interface(model, prompts: torch.Tensor) -> None:
    refused("nonsense", lambda: model(prompts, nonsense=3))
    refused("nonsense", lambda: model.generate(prompts, max_new_tokens=2, nonsense=3))
    refused("token ids", lambda: model(inputs_embeds=torch.zeros(1, 3, 4)))
    refused("output_attentions", lambda: model(prompts, output_attentions=True))
    refused("expected what an earlier call", lambda: model(prompts, **{CACHE: object()}))
    assert model.config.use_cache is True
    whole = model(prompts, output_hidden_states=True)
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    logits = model.get_output_embeddings()(whole.hidden_states[-1])
    torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-5)
    picked = model(prompts, logits_to_keep=torch.tensor([0, 5, 11])).logits
    torch.testing.assert_close(picked, whole.logits[:, [0, 5, 11]], rtol=0, atol=0)
    assert isinstance(model(prompts, return_dict=False), tuple)


def check_training(directory: str, prompts: torch.Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).train()
    plain(prompts, labels=prompts).loss.backward()
    for reentrant in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(prompts, labels=prompts).loss.backward()
        for (name, found), want in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, want.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    features = base(prompts).last_hidden_state
    plain.eval()
    torch.testing.assert_close(plain.get_output_embeddings()(features), plain(prompts).logits, rtol=1e-5, atol=1e-5)
    before = plain(prompts).logits
    old = plain.config.vocab_size
    plain.resize_token_embeddings(old + 10)
    assert plain.config.vocab_size == plain.model.config.vocab_size == old + 10
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    torch.testing.assert_close(plain(prompts).logits[..., :old], before, rtol=1e-5, atol=1e-5)
    decayed, kept = plain.param_groups(0.1)
    names = {id(p): name for name, p in plain.named_parameters()}
    assert not {"A_log", "D", "dt_bias"} & {names[id(p)].rpartition(".")[2] for p in decayed["params"]}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    half = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16)
    kept_precise = {name.rpartition(".")[2] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept_precise == {"A_log", "D", "dt_bias"}, kept_precise


def check_tokenizer(directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = tokenizer.bos_token_id
    with_start = tokenizer("import os").input_ids
    assert with_start[0] == start
    assert tokenizer("import os", add_special_tokens=False).input_ids == with_start[1:]
    assert tokenizer.decode(with_start, skip_special_tokens=True) == "import os"
    again = AutoTokenizer.from_pretrained(directory, add_bos_token=True)
    assert again("import os").input_ids == with_start


def equal(name: str, found: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(found, want), f"{name}: found {found.tolist()}, expected {want.tolist()}"


def refused(message: str, call) -> None:
    found: Exception | None = None
    try:
        call()
    except (TypeError, ValueError) as error:
        found = error
    assert message in str(found), f"expected an error that says {message!r}, found: {found}"


if __name__ == "__main__":
    check(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    print(f"ok on transformers {transformers.__version__}")
