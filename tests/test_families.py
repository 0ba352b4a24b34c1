"""Released models of five families, in small: their chat templates and tokenizer pipelines, random weights.

No installed package ships the vocabulary of a real tokenizer, so each is trained here on a few sentences; around
it, normalizer, pre-tokenizer, post-processor, special tokens and `tokenizer_class` are the family's. Templates are
rewritten to what matters of those in the models' tokenizer_config.json, as public code quotes them: one question and
its answer, a system prompt; no tools, images or further turns:

    llama    Llama-3-8B-Instruct, and circuit breakers on it (GraySwanAI/Llama-3-8B-Instruct-RR)
    mistral  Mistral-7B-Instruct-v0.2 of early 2024, and circuit breakers on it (GraySwanAI/Mistral-7B-Instruct-RR)
    r1       DeepSeek-R1-Distill-Llama-8B; SafeChain and RealSafe-R1 are trained from it
    r1-qwen  DeepSeek-R1-Distill-Qwen; likewise
    qwen2    Qwen2.5-Instruct; TARS-1.5B is trained from it
    qwen3    Qwen3, which can be told whether to reason
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from lib.attacks.core import Budget
from lib.attacks.suffix import Slot
from lib.chat import (
    THINK_OPEN,
    Parsed,
    _end_of_turn_id,
    decode,
    encode_example,
    encode_prompt,
    eos_token_ids,
    load_tokenizer,
    parse_completion,
)
from lib.files import UserError, read_jsonl, write_jsonl
from lib.policy import load_policy
from lib.rewards import Judge
from lib.sampler import sample
from lib.victim import Victim

stage = importlib.import_module("04_attack_eval")

LLAMA = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{{ (bos_token if loop.first else '') + content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MERGING = (  # what Mistral's later template does with a system prompt
    "{% if messages[0].role == 'system' %}{% set before = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set before = '' %}{% endif %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ ' [INST] ' + (before if loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SENTENCES = [
    "Write a poem about green soup, please. Sure, here is a poem about soup: roses are red and the soup is green.",
    "How do I bake a cake, please? They ask for a cake, so I should help them. Mix the flour with some sugar.",
    "You are a helpful assistant. Be brief. Tell me a story about the little red boat that went to the sea, please.",
] * 8


@dataclass(frozen=True)
class Family:
    architecture: type
    template: str
    tokenizer_class: str  # as its tokenizer_config.json says, right or wrong
    bos: str | None
    eos: str
    end_of_turn: str
    opened: str  # what its generation prompt of "Hi" is, without reasoning and without a system prompt
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # tokens of their own, but ordinary text to a decoder
    digits: str = ""


THINK, DEEPSEEK = ("<think>", "</think>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
R1_OPENED = DEEPSEEK[0] + "<｜User｜>Hi<｜Assistant｜>"
FAMILIES = {
    "llama": Family(
        LlamaForCausalLM,
        LLAMA,
        "PreTrainedTokenizerFast",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        digits="{1,3}",
    ),
    "mistral": Family(MistralForCausalLM, MISTRAL, "LlamaTokenizer", "<s>", "</s>", "</s>", "<s> [INST] Hi [/INST]"),
    "r1": Family(
        LlamaForCausalLM,
        R1,
        "LlamaTokenizerFast",
        *DEEPSEEK,
        DEEPSEEK[1],
        R1_OPENED,
        DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", *THINK),
        digits="{1,3}",
    ),
    "r1-qwen": Family(
        Qwen2ForCausalLM,
        R1,
        "LlamaTokenizerFast",
        *DEEPSEEK,
        DEEPSEEK[1],
        R1_OPENED,
        DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", *THINK),
    ),
    "qwen2": Family(
        Qwen2ForCausalLM,
        QWEN2,
        "Qwen2Tokenizer",
        None,
        "<|im_end|>",
        "<|im_end|>",
        f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        CHATML,
    ),
    "qwen3": Family(
        Qwen3ForCausalLM,
        QWEN3,
        "Qwen2Tokenizer",
        None,
        "<|endoftext|>",  # a base's; its template ends a turn with another token
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        CHATML,
        THINK,
    ),
}


def byte_level(family: Family) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if "Qwen" in family.architecture.__name__:
        core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS % family.digits), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens(list(family.special))
    core.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    return core


def sentence_piece(family: Family) -> Tokenizer:
    """Spaces are "▁", one is put before every text, and what the vocabulary lacks is spelt in bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(core.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def publish(name: str, folder: Path) -> None:
    """A folder as on the hub: weights, tokenizer.json, and a tokenizer_config.json with the family's own claims."""
    family = FAMILIES[name]
    core = sentence_piece(family) if name == "mistral" else byte_level(family)
    if family.bos:
        bos = [(family.bos, core.token_to_id(family.bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=bos)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = family.architecture.config_class(
        vocab_size=core.get_vocab_size() + 5,  # padded, as real ones are
        max_position_embeddings=256,
        initializer_range=0.3,  # large, so that the suffix matters
        eos_token_id=core.token_to_id(family.eos),
        bos_token_id=core.token_to_id(family.bos) if family.bos else None,
        **sizes,
    )
    family.architecture(config).save_pretrained(folder)
    core.save(str(folder / "tokenizer.json"))
    claims = {"tokenizer_class": family.tokenizer_class, "bos_token": family.bos, "eos_token": family.eos}
    claims |= {"add_bos_token": bool(family.bos), "clean_up_tokenization_spaces": False, "chat_template": family.template}
    (folder / "tokenizer_config.json").write_text(json.dumps(claims))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these gain nothing from more, and on a busy machine lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name in FAMILIES:
        publish(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def loaded(hub) -> dict:
    """Family -> its tokenizer and model, as the stage loads them."""
    pairs = {name: (load_tokenizer(hub / name), load_policy(str(hub / name), device="cpu", dtype="float32")) for name in FAMILIES}
    return {name: (tokenizer, model.eval().requires_grad_(False)) for name, (tokenizer, model) in pairs.items()}


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_text_is_read_as_the_published_file_reads_it(hub, loaded, name):
    """R1's claim of a LlamaTokenizerFast is wrong: some releases of transformers 5 then drop every space."""
    tokenizer, core = loaded[name][0], Tokenizer.from_file(str(hub / name / "tokenizer.json"))
    for text in (SENTENCES[0], "Sure, 12345 naïve\n\n  cakes?", "<think>\nThey ask.\n</think>\n\nHi"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids).strip() == core.decode(ids, skip_special_tokens=False).strip() == text.strip()


@every_family
def test_a_prompt_has_one_beginning_and_opens_the_reasoning_once(loaded, name):
    tokenizer, family = loaded[name][0], FAMILIES[name]
    direct, thinking = (encode_prompt(tokenizer, "Hi", reasoning=r) for r in (False, True))
    assert tokenizer.decode(direct) == family.opened
    turn = family.opened.removesuffix("<think>\n\n</think>\n\n")
    assert "".join(tokenizer.decode(thinking).split()) == "".join((turn + THINK_OPEN).split())
    assert tokenizer.decode(thinking).endswith(THINK_OPEN) and tokenizer.decode(thinking).count("<think>") == 1
    assert "<think>" not in turn
    for ids in (direct, thinking):
        assert (
            (ids.count(tokenizer.bos_token_id) if family.bos else 0) == (ids[:1] == [tokenizer.bos_token_id]) == bool(family.bos)
        )


@every_family
def test_an_example_begins_with_its_prompt_and_ends_with_the_end_of_turn(loaded, name):
    tokenizer, model = loaded[name]
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end_of_turn)
    assert _end_of_turn_id(tokenizer, tokenizer.chat_template) == end
    assert {end, tokenizer.eos_token_id} == set(eos_token_ids(model, tokenizer))
    direct, thinking = (encode_prompt(tokenizer, "Bake a cake", reasoning=r) for r in (False, True))
    opening = tokenizer.encode(THINK_OPEN, add_special_tokens=False)
    for reasoning, prompt in ((None, direct), ("They ask for a cake.", thinking)):
        ids, mask = encode_example(tokenizer, "Bake a cake", reasoning, "Mix the flour.")
        learned = len(prompt) - (len(opening) if reasoning else 0)
        assert ids[: len(prompt)] == prompt and ids[-1] == end and mask == [i >= learned for i in range(len(ids))]
        read = parse_completion(decode(tokenizer, ids[len(prompt) :]))
        assert read == Parsed(reasoning or "", "Mix the flour.", reasoning is not None)


def test_r1_is_read_as_its_template_writes_it_whether_it_opens_the_reasoning_or_not(loaded):
    tokenizer = loaded["r1"][0]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    thinking, direct = (encode_prompt(tokenizer, "Hi", reasoning=r) for r in (True, False))
    assert thinking == tokenizer.encode(text, add_special_tokens=False)
    try:
        for other in ("", "<think>"):  # R1's own first template; DeepSeek-V3.1's
            tokenizer.chat_template = R1.replace("<think>\n", other)
            assert encode_prompt(tokenizer, "Hi", reasoning=True) == thinking
            assert encode_prompt(tokenizer, "Hi", reasoning=False) == direct
    finally:
        tokenizer.chat_template = R1


SYSTEM = {  # what stands before the user's text
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "r1": DEEPSEEK[0] + "Be brief.<｜User｜>",
    "r1-qwen": DEEPSEEK[0] + "Be brief.<｜User｜>",
    "qwen2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
}


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("name", SYSTEM)
def test_a_system_prompt_stands_where_the_template_puts_it(loaded, name, reasoning):
    tokenizer = loaded[name][0]
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", reasoning=reasoning, system="Be brief.")).startswith(
        SYSTEM[name] + "Hi"
    )


def test_a_template_without_system_prompts_says_so_in_one_line(loaded):
    tokenizer = loaded["mistral"][0]
    try:
        for template, reason in (
            (MISTRAL, "takes no system prompt (Only user and assistant roles are supported!): leave it out"),
            (
                MISTRAL.replace("{{ raise_exception('Only user and assistant roles are supported!') }}", ""),
                "drops system prompts",
            ),
        ):
            tokenizer.chat_template = template
            with pytest.raises(UserError) as error:
                encode_prompt(tokenizer, "Hi", reasoning=False, system="Be brief.")
            message = str(error.value)
            assert message.startswith("--systems: given 'Be brief.'; ") and reason in message and "\n" not in message
        tokenizer.chat_template = MERGING
        merged = tokenizer.decode(encode_prompt(tokenizer, "Hi", reasoning=False, system="Be brief."))
        assert "[INST] Be brief.\n\nHi [/INST]" in merged
        tokenizer.chat_template = "{{ raise_exception('no\nmore') }}"
        with pytest.raises(UserError, match="its chat template fails: no more$"):
            encode_prompt(tokenizer, "Hi", reasoning=False)
    finally:
        tokenizer.chat_template = MISTRAL


@every_family
def test_a_suffix_is_scored_as_the_model_will_read_it(loaded, name):
    tokenizer, model = loaded[name]
    reasoning, behaviour = "r1" in name or name == "qwen3", {"id": "a", "prompt": "Tell me a story", "target": "Sure, a story"}
    judge = Judge("none", lambda prompts, answers: [0.0] * len(answers), lambda prompts, answers: [0.0] * len(answers))
    victim = Victim(name, model, tokenizer, reasoning, judge, max_new_tokens=4, temperature=0.0)
    budget = Budget(gcg_steps=1, gcg_width=1, gcg_top_k=1, gcg_suffix_tokens=4, gcg_init="please")
    slot = Slot(victim, behaviour, behaviour["target"], budget)
    assert slot.is_exact(budget.initial_suffix(), slot.start)
    assert (
        tokenizer.decode(slot.prefix).endswith("Tell me a story")
        and tokenizer.decode(slot.start.tolist()).strip() == budget.initial_suffix()
    )
    end = tokenizer.decode(slot.rest)
    assert end.endswith(THINK_OPEN) if reasoning else "<think>" not in end
    allowed = slot.allowed()
    assert not allowed[[i for i in tokenizer.get_added_vocab().values()]].any() and not allowed[len(tokenizer) :].any()
    candidates = slot.start.repeat(40, 1)
    choices = allowed.nonzero().flatten()
    candidates[:, 2] = choices[torch.randperm(len(choices), generator=torch.Generator().manual_seed(0))[:40]]
    kept, texts = slot.surviving(candidates)
    assert len(kept) and all(slot.is_exact(text, row) for text, row in zip(texts, kept, strict=True))
    ids = victim.encode(f"Tell me a story {texts[0]}") + slot.target.tolist()
    logits = model(input_ids=torch.tensor([ids])).logits[0, -len(slot.target) - 1 : -1]
    assert slot.losses(kept[:1]).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, slot.target).item(), rel=1e-4)


@every_family
def test_greedy_samples_are_what_generate_writes(loaded, name):
    tokenizer, model = loaded[name]
    prompts = [encode_prompt(tokenizer, text, reasoning="r1" in name) for text in ("Hi", "Tell me a story about the sea")]
    ends = eos_token_ids(model, tokenizer)
    drawn = sample(model, prompts, max_new_tokens=10, temperature=0.0, eos_token_ids=ends)
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert completion.token_ids == written[0, len(prompt) :].tolist()


def test_one_command_attacks_a_reasoner_and_a_model_without_reasoning(hub, tmp_path, monkeypatch):
    for file, kind in (("harmful", "harmful"), ("ambiguous", "ambiguous")):
        record = {
            "prompt": "Tell me a story",
            "kind": kind,
            "source": "test",
            "category": "any",
            "target": "Sure, here is a story",
        }
        write_jsonl(tmp_path / f"data/eval_{file}.jsonl", [{"id": f"{file}-0", **record}])
    words = "--judge standin --max-new-tokens 8 --answer-tokens 6 --device cpu --behaviours 1 --gcg-steps 2 --gcg-width 6"
    words += " --gcg-top-k 8 --gcg-suffix-tokens 3 --budgets 0 --direct llama --attacks gcg prefill_answer --preset smollm"
    models = ["--models", f"llama={hub / 'llama'}", f"r1={hub / 'r1'}", "--systems", "llama=Be brief."]
    paths = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "eval"), "--gcg-init", "please"]
    monkeypatch.setattr(sys, "argv", ["04", *paths, *words.split(), *models])
    monkeypatch.setattr("lib.report.draw_figures", lambda *args: {})  # slow
    stage.main()
    results = json.loads((tmp_path / "eval/results.json").read_text())["models"]
    assert all({"direct", "gcg", "prefill_answer"} <= results[name]["dsr"].keys() for name in ("llama", "r1"))
    assert [results[name]["reasoning"] for name in ("llama", "r1")] == [False, True]
    lines = read_jsonl(tmp_path / "eval/completions.jsonl")
    opened = {line["model"]: line["opening"] for line in lines if line["set"] == "prefill_answer"}
    assert opened["llama"] == "Sure, here is a story" and "</think>" in opened["r1"]
    for attempt in read_jsonl(tmp_path / "eval/attacks.jsonl"):
        if attempt["attack"] == "gcg":
            assert (
                attempt["trace"][0]["sent"] == "Tell me a story please please please" and attempt["cost"]["backward_tokens"] > 0
            )
