"""Architectures and tokenizers unlike Llama and Qwen: what is accepted is exact, all else is refused.

The checks, and all causal architectures of transformers: tests/bench/families.py.
"""

from __future__ import annotations

import json
import types

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lib import UserError
from lib.chat import decode
from lib.policy import context_of, token_logprobs
from lib.run.hub import check_tokenizer, load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sampler import sample
from tests.bench import families
from tests.bench.families import TEMPLATE, make, word_tokenizer

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
LONGROPE |= {"long_factor": [1.5, 4.0, 12.0, 40.0], "original_max_position_embeddings": 64}
PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
DYNAMIC |= {"max_position_embeddings": 64}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
GEMMA3 = {"text_config": {**families.SIZES, "pad_token_id": 0}, "mm_tokens_per_image": 4}
GEMMA3 |= {"image_token_index": 96, "vision_config": VISION | {"image_size": 28, "patch_size": 14}}
ACCEPTED = {  # what was wrong with it -> architecture, changes of its configuration
    "no SDPA, but sinks": ("gpt_oss", {}),
    "no SDPA, and no end of its context": ("bloom", {}),
    "a module by the name of a number": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "scales what it looks up in place": ("ctrl", {}),
    "heads of other widths in other layers": ("gemma4_text", {}),
    "positions that change with the batch": ("phi3", PHI3),
    "logits that are divided": ("granite", {"logits_scaling": 4.0}),
    "logits that are multiplied": ("cohere", {"logit_scale": 0.25}),
    "logits that are bounded": ("gemma2", {"final_logit_softcapping": 2.0}),
    "a configuration within a configuration": ("gemma3", GEMMA3),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_is_exact_in_all_that_it_is_used_for(case, monkeypatch):
    monkeypatch.setattr(families, "NEW", 4)
    found = families.examine(*ACCEPTED[case])
    noise = found.pop("checkpointing")  # some have noise that cannot be switched off
    assert noise.startswith(("ok", "REFUSED"))
    assert found == dict.fromkeys(("sampling", "logprobs", "gcg", "autodan", "saving"), "ok")


REFUSED = {  # cause, as it is said -> architecture
    "has layers of linear_attention": "qwen3_next",
    "has layers of chunked_attention": "llama4_text",
    "log-probabilities in training are not those of the sampler": "bart",
    "it does not heed logits_to_keep": "whisper",
}


@pytest.mark.parametrize("cause", REFUSED)
def test_what_is_not_exact_is_refused_when_it_is_loaded(tmp_path, cause):
    with pytest.raises(UserError, match=cause) as error:
        load_policy(make(tmp_path, REFUSED[cause], {}), device="cpu")
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


NOISY = {"qwen2": {}, "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3}}
NOISY |= {"phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}}


@pytest.mark.parametrize("kind", NOISY)
def test_gradient_checkpointing_adds_no_noise_of_any_kind(tmp_path, kind):
    folder = make(tmp_path, kind, {"attention_dropout": 0.3, **NOISY[kind]})
    ids, passes, results = torch.arange(5, 17)[None], [], []
    for checkpointing in (False, True):
        model = load_policy(folder, device="cpu", gradient_checkpointing=checkpointing)
        model.model.layers[0].self_attn.register_forward_pre_hook(lambda *args: passes.append(1))
        logprobs = token_logprobs(model, ids, ids > 0, ids > 5)
        logprobs.sum().backward()
        results.append((logprobs, model.get_input_embeddings().weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len(passes) == 3  # once without, and once more in the backward pass with it


def test_noise_that_cannot_be_switched_off_is_refused_with_checkpointing_alone(tmp_path):
    folder = make(tmp_path, "opt", {"dropout": 0.3})
    load_policy(folder, device="cpu")
    with pytest.raises(UserError, match="OPTForCausalLM cannot be used here with --gradient-checkpointing"):
        load_policy(folder, device="cpu", gradient_checkpointing=True)


CONTEXTS = [("phi3", PHI3, 64), ("llama", DYNAMIC, 64), ("llama", {}, 256), ("mpt", {}, 256)]


@pytest.mark.parametrize("case", CONTEXTS)
def test_rows_over_the_length_at_which_all_positions_change_are_refused(tmp_path, case):
    kind, changes, context = case
    model = load_policy(make(tmp_path, kind, changes), device="cpu")
    prompts, how = [[5] * 4, [5] * (context - 7)], dict(temperature=0.0, eos_token_ids=[])
    assert context_of(model.config) == context
    sample(model, prompts, max_new_tokens=7, **how)
    with pytest.raises(ValueError, match=f"prompt 1: .* exceed context .*: {context} fit"):
        sample(model, prompts, max_new_tokens=8, **how)
    ids = torch.full((1, context + 1), 5)
    with pytest.raises(UserError, match=f"a row of {context + 1} tokens exceeds .*, {context}"):
        token_logprobs(model, ids, ids > 0, torch.arange(context + 1)[None] > 0)


# ---- tokenizers


@pytest.mark.parametrize("claim, unknown", [("Qwen2Tokenizer", "<unk>"), (None, "<unk>"), (None, "-")])
def test_a_tokenizer_of_its_own_is_read_as_it_stands(tmp_path, claim, unknown):
    """transformers builds that of every Qwen2 anew from the vocabulary: letters, where these are words."""
    word_tokenizer(unknown).save_pretrained(make(tmp_path, "qwen2", {}))
    claims = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": claim}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in claims.items() if v}))
    tokenizer, text = load_tokenizer(tmp_path), "tell me a story"
    assert len(tokenizer) == 97 and decode(tokenizer, tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_policy(make(tmp_path_factory.mktemp("llama"), "llama", {}), device="cpu")


def test_ids_of_words_and_template_have_rows_or_it_is_refused(llama):
    tokenizer, prompts = word_tokenizer(), ["tell me a story"]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # without a row: it gives way to the end of sequence
    check_tokenizer(llama, tokenizer, prompts, reasoning=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    tokenizer.chat_template = TEMPLATE.replace("<|im_start|>", "[PAD]")
    with pytest.raises(UserError, match="ids up to 97, its model 97 rows: they do not belong together"):
        check_tokenizer(llama, tokenizer, prompts, reasoning=True)
    run = Run(types.SimpleNamespace(out="runs/any", reasoning=True))
    item = types.SimpleNamespace(record={"id": "x", "prompt": prompts[0]}, ids=[5, 97])
    with pytest.raises(UserError, match="rl.jsonl: x: has the token id 97, the model 97 rows"):
        run.usable([item], llama, word_tokenizer(), 9, "rl.jsonl")


def test_a_tokenizer_that_loses_words_is_one_line(llama):
    with pytest.raises(UserError, match="loses most words of the prompts: 'Write a poem' becomes 'a'"):
        check_tokenizer(llama, word_tokenizer(), ["Write a poem"], reasoning=True)
    check_tokenizer(llama, word_tokenizer(), ["tell me poems"], reasoning=True)  # of which most is kept
    with pytest.raises(UserError, match="its tokenizer cannot read .*Hello"):
        check_tokenizer(llama, word_tokenizer(unknown="-"), ["Hello"], reasoning=True)


def test_a_tokenizer_may_compose_accents_but_must_write_the_markers(llama):
    core = json.loads(word_tokenizer().backend_tokenizer.to_str())
    words, core["normalizer"] = core["model"]["vocab"], {"type": "NFC"}
    words["other"], words["caf\u00e9"] = words.pop("</think>"), words.pop("w3")
    core = Tokenizer.from_str(json.dumps(core))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    check_tokenizer(llama, tokenizer, ["cafe\u0301 cafe\u0301"], reasoning=False)  # the same, in two letters
    with pytest.raises(UserError, match="cannot write <think> and </think>"):
        check_tokenizer(llama, tokenizer, ["tell me a story"], reasoning=True)
