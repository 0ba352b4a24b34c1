"""Architectures and tokenizers unlike Llama and Qwen: what is accepted is exact, all else is refused.

All causal architectures of transformers, and attacks on them: tests/bench/families.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lib import UserError
from lib.batches import pad_batch
from lib.cache import repeat_row
from lib.chat import decode, encode_prompt
from lib.policy import context_of, token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.checks import check_ids, check_tokenizer
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import sample
from tests.bench.decoders import FixedBatch, sampling_by

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, head_dim=8)
SIZES |= dict(eos_token_id=2, bos_token_id=1, pad_token_id=0)
SMALL = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
LONGROPE |= {"long_factor": [1.5, 4.0, 12.0, 40.0], "original_max_position_embeddings": 32}
PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
DYNAMIC |= {"max_position_embeddings": 64}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 7}
GEMMA_4 = dict(vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, global_head_dim=8)
GEMMA_4 |= dict(num_global_key_value_heads=2, num_kv_shared_layers=0, num_hidden_layers=6, sliding_window=7)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=28, patch_size=14)
GEMMA_3 = dict(text_config=SIZES | GEMMA, vision_config=VISION, mm_tokens_per_image=4, image_token_index=96)
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}
LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
HYBRID = {**dict.fromkeys(LINEAR, 4), "layer_types": ["linear_attention", "full_attention"]}
CHUNKED = {"attention_chunk_size": 16, "intermediate_size_mlp": 64, **EXPERTS}
DECODER = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)
WHISPER = {**DECODER, "decoder_start_token_id": 1, "suppress_tokens": None}


def word_level(unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    """97 words, split at spaces; without a word for the `unknown`, it raises what it does not know."""
    words = "<unk> <|im_start|> <|im_end|> <pad> <think> </think> user assistant tell me a story".split()
    words += [f"w{i}" for i in range(97 - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"] + [unknown] * (unknown in words))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny(folder: Path, architecture: str, changes: dict, sizes: dict = SIZES) -> Path:
    """A folder with a random model of an architecture, and the word-level tokenizer."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_level().save_pretrained(folder)
    return folder


ACCEPTED = {  # what was wrong with it -> architecture, changes of its configuration
    "no SDPA, but sinks": ("GptOss", {**EXPERTS, "sliding_window": 7}),
    "no SDPA, and no end of its context": ("Bloom", {}, SMALL),
    "a module by the name of a number": ("Falcon", FALCON),
    "scales what it looks up in place": ("CTRL", {"dff": 64, "n_positions": 256}, SMALL),
    "heads of other widths in other layers": ("Gemma4Text", GEMMA_4),
    "positions that change with the batch": ("Phi3", PHI3),
    "logits that are divided": ("Granite", {"logits_scaling": 4.0}),
    "logits that are multiplied": ("Cohere", {"logit_scale": 0.25}),
    "logits that are bounded": ("Gemma2", {**GEMMA, "final_logit_softcapping": 2.0}),
    "a configuration within a configuration": ("Gemma3", GEMMA_3, {}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_is_exact_in_all_that_it_is_used_for(tmp_path, case):
    model = load_policy(tiny(tmp_path / "base", *ACCEPTED[case]), device="cpu")

    def literal(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 96, (n,), generator=generator).tolist() for n in (3, 14, 8)]
    how: dict = dict(max_new_tokens=8, temperature=0.0, eos_token_ids=[])
    drawn = sample(model, prompts, **how)
    with sampling_by(FixedBatch):  # shapes as on a GPU
        assert [c.token_ids for c in sample(model, prompts, **how)] == [c.token_ids for c in drawn]
    rows = [prompt + completion.token_ids for prompt, completion in zip(prompts, drawn, strict=True)]
    expected = [literal(row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0] for row in rows]
    for row, completion, logprobs in zip(rows, drawn, expected, strict=True):
        assert completion.token_ids == literal(row)[-9:-1].argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs[-8:], atol=1e-4, rtol=1e-4)
    for side in ("left", "right"):
        ids, mask = pad_batch(rows, 0, side=side)
        predicted = mask & (mask.cumsum(1) > 1)
        found = token_logprobs(model, ids, mask, predicted)[predicted]
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)

    cache, ids = transformers.DynamicCache(), torch.tensor(rows[1])  # suffixes behind one prompt
    model(input_ids=ids[None, :10], cache=cache, use_cache=True)
    logits = model(input_ids=ids[10:].repeat(2, 1), cache=repeat_row(cache, 2), logits_to_keep=5).logits
    for row in logits.log_softmax(-1):
        torch.testing.assert_close(row, literal(rows[1])[-5:], atol=1e-4, rtol=1e-4)

    save_policy(model, load_tokenizer(tmp_path / "base"), tmp_path / "saved")
    again, ids = load_policy(tmp_path / "saved", device="cpu"), ids[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


REFUSED = {  # cause, as it is said -> architecture, changes of its configuration
    "has layers of linear_attention": ("Qwen3Next", HYBRID),
    "has layers of chunked_attention": ("Llama4Text", CHUNKED),
    "log-probabilities in training are not those of the sampler": ("Bart", DECODER),
    "it does not heed logits_to_keep": ("Whisper", WHISPER),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_what_is_not_exact_is_refused_when_it_is_loaded(tmp_path, cause):
    with pytest.raises(UserError, match=cause) as error:
        load_policy(tiny(tmp_path, *REFUSED[cause]), device="cpu")
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


NOISY = {"Starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3}}
NOISY |= {"Phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, **EXPERTS}}


@pytest.mark.parametrize("architecture", NOISY)
def test_gradient_checkpointing_adds_no_noise_of_any_kind(tmp_path, architecture):
    folder = tiny(tmp_path, architecture, {"attention_dropout": 0.3, **NOISY[architecture]})
    ids = torch.arange(5, 17)[None]
    results = []
    for checkpointing in (False, True):
        model = load_policy(folder, device="cpu", gradient_checkpointing=checkpointing)
        logprobs = token_logprobs(model, ids, ids > 0, ids > 5)
        logprobs.sum().backward()
        results.append((logprobs, model.get_input_embeddings().weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_noise_that_cannot_be_switched_off_is_refused_with_checkpointing_alone(tmp_path):
    folder = tiny(tmp_path, "OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.3})
    load_policy(folder, device="cpu")
    with pytest.raises(UserError, match="OPTForCausalLM cannot be used here with --gradient-checkpointing"):
        load_policy(folder, device="cpu", gradient_checkpointing=True)


@pytest.mark.parametrize("case", [("Phi3", PHI3, 32), ("Llama", DYNAMIC, 64), ("Llama", {}, 256)])
def test_rows_over_the_length_at_which_all_positions_change_are_refused(tmp_path, case):
    architecture, changes, context = case
    model = load_policy(tiny(tmp_path, architecture, changes), device="cpu")
    prompts, how = [[5] * 4, [5] * (context - 7)], dict(temperature=0.0, eos_token_ids=[])
    assert context_of(model.config) == context
    sample(model, prompts, max_new_tokens=7, **how)
    with pytest.raises(ValueError, match=f"prompt 1: .* exceed the model's context .*: {context} fit"):
        sample(model, prompts, max_new_tokens=8, **how)
    ids = torch.full((1, context + 1), 5)
    with pytest.raises(UserError, match=f"a row of {context + 1} tokens exceeds .*, {context}"):
        token_logprobs(model, ids, ids > 0, torch.arange(context + 1)[None] > 0)


# ---- tokenizers


@pytest.mark.parametrize("claim", ["TokenizersBackend", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("unknown", ["<unk>", "-"])
def test_a_tokenizer_of_its_own_is_read_as_it_stands(tmp_path, claim, unknown):
    """transformers builds that of every Qwen2 anew from the vocabulary: letters, where these are words."""
    word_level(unknown=unknown).save_pretrained(tiny(tmp_path, "Qwen2", {}))
    claims = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": claim}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in claims.items() if v}))
    tokenizer, text = load_tokenizer(tmp_path), "tell me a story"
    assert len(tokenizer) == 97 and decode(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_policy(tiny(tmp_path_factory.mktemp("llama"), "Llama", {}), device="cpu")


def test_a_padding_token_without_a_row_gives_way_if_eos_has_one(llama):
    tokenizer = word_level()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 97
    check_tokenizer(llama, tokenizer, ["tell me a story"], reasoning=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    with pytest.raises(UserError, match="x: has the token id 97, the model 97 rows"):
        check_ids(llama, [encode_prompt(tokenizer, "a [PAD]", reasoning=True)], ["x"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[EOS]"})
    with pytest.raises(UserError, match="ids up to 98, its model 97 rows: they do not belong together"):
        check_tokenizer(llama, tokenizer, ["tell me a story"], reasoning=True)


def test_a_tokenizer_that_loses_words_or_markers_is_one_line(llama, tmp_path):
    with pytest.raises(UserError, match="loses most words of the prompts: 'Write a poem' becomes 'a'"):
        check_tokenizer(llama, word_level(), ["Write a poem"], reasoning=True)
    check_tokenizer(llama, word_level(), ["tell me poems"], reasoning=True)  # of which most is kept
    check_tokenizer(llama, words := word_level(unknown="-"), ["tell me a story"], reasoning=True)
    with pytest.raises(UserError, match="its tokenizer cannot read .*Hello"):
        encode_prompt(words, "Hello", reasoning=True)
    core = json.loads(word_level().backend_tokenizer.to_str())
    core["model"]["vocab"]["other"] = core["model"]["vocab"].pop("</think>")
    core["model"]["vocab"]["caf\u00e9"] = core["model"]["vocab"].pop("w3")
    core["normalizer"] = {"type": "NFC"}
    core = Tokenizer.from_str(json.dumps(core))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    check_tokenizer(llama, tokenizer, ["cafe\u0301 cafe\u0301"], reasoning=False)  # the same, in two letters
    with pytest.raises(UserError, match="cannot write <think> and </think>"):
        check_tokenizer(llama, tokenizer, ["tell me a story"], reasoning=True)
    smaller = load_policy(tiny(tmp_path, "Llama", {"vocab_size": 90}), device="cpu")
    with pytest.raises(UserError, match="ids up to 96, its model 90 rows: they do not belong together"):
        check_tokenizer(smaller, word_level(), ["tell me a story"], reasoning=True)
