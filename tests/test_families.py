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

import datetime
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from lib.run.plan import Need, memory, shape_of_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lib import UserError
from lib.attacks.autodan import target_losses
from lib.attacks.core import Budget, Cost
from lib.attacks.suffix import Slot, first_exact, surviving
from lib.attacks.victim import Victim
from lib.batches import pad_batch
from lib.chat import (
    THINK_OPEN,
    Parsed,
    _end_of_turn_id,
    decode,
    encode_example,
    encode_prompt,
    eos_token_ids,
    parse_completion,
    render,
    set_date,
)
from lib.judges import Judge
from lib.policy import context_of, token_logprobs
from lib.run.checks import check_tokenizer
from lib.run.files import read_jsonl, write_jsonl
from lib.run.folder import date_of_run
from lib.run.hub import load_policy, load_tokenizer
from lib.run.presets import smollm
from lib.sampler import sample

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
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + QWEN_SYSTEM
    + "<|im_end|>\n' }}{% endif %}"
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
    "mistral": Family(
        MistralForCausalLM, MISTRAL, "LlamaTokenizer", "<s>", "</s>", "</s>", "<s> [INST] Hi [/INST]"
    ),
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
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
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
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
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
    claims |= {
        "add_bos_token": bool(family.bos),
        "clean_up_tokenization_spaces": False,
        "chat_template": family.template,
    }
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
    pairs = {
        name: (load_tokenizer(hub / name), load_policy(str(hub / name), device="cpu", dtype="float32"))
        for name in FAMILIES
    }
    return {
        name: (tokenizer, model.eval().requires_grad_(False)) for name, (tokenizer, model) in pairs.items()
    }


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_text_is_read_as_the_published_file_reads_it(hub, loaded, name):
    """R1's claim of a LlamaTokenizerFast is wrong: some releases of transformers 5 then drop every space."""
    tokenizer, core = loaded[name][0], Tokenizer.from_file(str(hub / name / "tokenizer.json"))
    for text in (SENTENCES[0], "Sure, 12345 naïve\n\n  cakes?", "<think>\nThey ask.\n</think>\n\nHi"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert (
            tokenizer.decode(ids).strip()
            == core.decode(ids, skip_special_tokens=False).strip()
            == text.strip()
        )


@every_family
def test_a_prompt_has_one_beginning_and_opens_the_reasoning_once(loaded, name):
    tokenizer, family = loaded[name][0], FAMILIES[name]
    direct, thinking = (encode_prompt(tokenizer, "Hi", reasoning=r) for r in (False, True))
    assert tokenizer.decode(direct) == family.opened
    turn = family.opened.removesuffix("<think>\n\n</think>\n\n")
    assert "".join(tokenizer.decode(thinking).split()) == "".join((turn + THINK_OPEN).split())
    assert (
        tokenizer.decode(thinking).endswith(THINK_OPEN) and tokenizer.decode(thinking).count("<think>") == 1
    )
    assert "<think>" not in turn
    for ids in (direct, thinking):
        assert (
            (ids.count(tokenizer.bos_token_id) if family.bos else 0)
            == (ids[:1] == [tokenizer.bos_token_id])
            == bool(family.bos)
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
        assert (
            ids[: len(prompt)] == prompt
            and ids[-1] == end
            and mask == [i >= learned for i in range(len(ids))]
        )
        read = parse_completion(decode(tokenizer, ids[len(prompt) :]))
        assert read == Parsed(reasoning or "", "Mix the flour.", reasoning is not None)


def test_r1_is_read_as_its_template_writes_it_whether_it_opens_the_reasoning_or_not(loaded):
    tokenizer = loaded["r1"][0]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
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
    assert tokenizer.decode(
        encode_prompt(tokenizer, "Hi", reasoning=reasoning, system="Be brief.")
    ).startswith(SYSTEM[name] + "Hi")


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
            assert (
                message.startswith("--systems: given 'Be brief.'; ")
                and reason in message
                and "\n" not in message
            )
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
    reasoning, behaviour = (
        "r1" in name or name == "qwen3",
        {"id": "a", "prompt": "Tell me a story", "target": "Sure, a story"},
    )
    judge = Judge(
        "none", lambda prompts, answers: [0.0] * len(answers), lambda prompts, answers: [0.0] * len(answers)
    )
    victim = Victim(name, model, tokenizer, reasoning, judge, max_new_tokens=4, temperature=0.0)
    budget = Budget(gcg_steps=1, gcg_width=1, gcg_top_k=1, gcg_suffix_tokens=4, gcg_init="please")
    slot = Slot(victim, behaviour, behaviour["target"], budget, Cost())
    start, texts = slot.start[None], [budget.initial_suffix()]
    assert first_exact([slot], start, texts, torch.zeros(1)) == 0
    assert (
        tokenizer.decode(slot.prefix).endswith("Tell me a story")
        and tokenizer.decode(slot.start.tolist()).strip() == budget.initial_suffix()
    )
    end = tokenizer.decode(slot.rest)
    assert end.endswith(THINK_OPEN) if reasoning else "<think>" not in end
    allowed = slot.allowed()
    assert (
        not allowed[[i for i in tokenizer.get_added_vocab().values()]].any()
        and not allowed[len(tokenizer) :].any()
    )
    candidates = slot.start.repeat(40, 1)
    choices = allowed.nonzero().flatten()
    candidates[:, 2] = choices[torch.randperm(len(choices), generator=torch.Generator().manual_seed(0))[:40]]
    kept, texts = surviving([slot], candidates)
    rows = [first_exact([slot], kept[i : i + 1], [text], torch.zeros(1)) for i, text in enumerate(texts)]
    assert rows and {*rows} == {0}
    ids = victim.encode(f"Tell me a story {texts[0]}") + slot.target.tolist()
    logits = model(input_ids=torch.tensor([ids])).logits[0, -len(slot.target) - 1 : -1]
    assert stage.losses(slot, kept[:1]).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, slot.target).item(), rel=1e-4
    )


@every_family
def test_greedy_samples_are_what_generate_writes(loaded, name):
    tokenizer, model = loaded[name]
    prompts = [
        encode_prompt(tokenizer, text, reasoning="r1" in name)
        for text in ("Hi", "Tell me a story about the sea")
    ]
    ends = eos_token_ids(model, tokenizer)
    drawn = sample(model, prompts, max_new_tokens=10, temperature=0.0, eos_token_ids=ends)
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt])
        options = {
            "do_sample": False,
            "max_new_tokens": 10,
            "eos_token_id": ends,
            "pad_token_id": tokenizer.pad_token_id,
        }
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
    words = "--judge standin --max-new-tokens 8 --answer-tokens 6 --device cpu --behaviours 1 --gcg-steps 2"
    words += " --direct llama --attacks gcg prefill_answer --preset smollm"
    small = {"gcg_width": 6, "gcg_top_k": 8, "gcg_suffix_tokens": 3, "budgets": ["0"], "gcg_init": "please"}
    monkeypatch.setattr(smollm, "EVAL", smollm.EVAL | small)
    models = ["--models", f"llama={hub / 'llama'}", f"r1={hub / 'r1'}", "--systems", "llama=Be brief."]
    paths = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "eval")]
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
                attempt["trace"][0]["sent"] == "Tell me a story please please please"
                and attempt["cost"]["backward_tokens"] > 0
            )


# ---- architectures and tokenizers that are unlike Llama and Qwen, each a row: what is accepted is exact, all else is refused


WORD_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=2, bos_token_id=1
)
SIZES |= dict(head_dim=8, pad_token_id=0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SMALL = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
SHORT, LONG = [1.0] * 4, [1.5, 4.0, 12.0, 40.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
LONGROPE |= {"original_max_position_embeddings": 32}
OPT = dict(word_embed_proj_dim=32, ffn_dim=64)
HYBRID = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)
GEMMA_4 = dict(
    vocab_size_per_layer_input=97,
    hidden_size_per_layer_input=8,
    global_head_dim=8,
    num_global_key_value_heads=2,
)
GEMMA_4 |= dict(num_kv_shared_layers=0, num_hidden_layers=6, sliding_window=7)
DECODER = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)
JAMBA = dict(
    attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, num_experts=2
)


def word_level(
    template: str = WORD_TEMPLATE, special: tuple[str, ...] = (), unknown: bool = True
) -> PreTrainedTokenizerFast:
    """97 words, split at spaces; `special` of them are special tokens."""
    words = "<unk> <|im_start|> <|im_end|> <pad> <think> </think> user assistant system sure here is a story tell me about the sea"
    vocabulary = [*words.split(), "please", "cake", "they", "ask"]
    vocabulary += [f"w{i}" for i in range(97 - len(vocabulary))]
    core = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>" if unknown else "-"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>", *special])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<pad>"} | ({"unk_token": "<unk>"} if unknown else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def tiny(folder: Path, architecture: str, changes: dict, sizes: dict = SIZES) -> Path:
    """A folder with a random model of an architecture, and the word-level tokenizer."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_level().save_pretrained(folder)
    return folder


ACCEPTED = {  # what was wrong with it -> architecture, changes of its configuration
    "no SDPA": ("Gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 7}),
    "no SDPA, but sinks": ("GptOss", {**EXPERTS, "sliding_window": 7}),
    "no SDPA, and no end of its context": ("Bloom", {}, SMALL),
    "a module by the name of a number": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    ),
    "scales what it looks up in place": ("CTRL", {"dff": 64, "n_positions": 256}, SMALL),
    "heads of other widths in other layers": ("Gemma4Text", GEMMA_4),
    "positions that change with the batch": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_is_exact_in_all_that_it_is_used_for(tmp_path, case):
    model = load_policy(tiny(tmp_path, *ACCEPTED[case]), device="cpu").requires_grad_(False)
    tokenizer, generator = load_tokenizer(tmp_path), torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in (3, 14, 8)]

    def literal(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    drawn = sample(model, prompts, max_new_tokens=8, temperature=0.0, eos_token_ids=[])
    rows = [prompt + completion.token_ids for prompt, completion in zip(prompts, drawn, strict=True)]
    expected = [literal(row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0] for row in rows]
    for prompt, completion, row, logprobs in zip(prompts, drawn, rows, expected, strict=True):
        assert completion.token_ids == literal(row)[len(prompt) - 1 : -1].argmax(-1).tolist()
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), logprobs[len(prompt) - 1 :], atol=1e-4, rtol=1e-4
        )
    for side in ("left", "right"):
        ids, mask = pad_batch(rows, 0, side=side)
        found = token_logprobs(model, ids, mask, mask & (mask.cumsum(1) > 1))
        for values, row_mask, logprobs in zip(found, mask & (mask.cumsum(1) > 1), expected, strict=True):
            torch.testing.assert_close(values[row_mask], logprobs, atol=1e-4, rtol=1e-4)

    assert memory(shape_of_model(model), Need(64, sample_tokens=64))["peak"] > 0  # before step 1

    victim = Victim("x", model, tokenizer, True, NO_JUDGE, max_new_tokens=4, temperature=0.0)
    behaviour = {"id": "a", "prompt": "tell me about the sea", "target": "sure here is a story"}
    slot = Slot(victim, behaviour, behaviour["target"], BUDGET, Cost())
    ids, target = [*slot.prefix, *slot.start.tolist(), *slot.tail.tolist()], slot.target.tolist()
    nll = -literal(ids)[-len(target) :].gather(1, slot.target[:, None]).mean()
    assert stage.losses(slot, slot.start[None]).item() == pytest.approx(nll.item(), abs=1e-4)
    assert target_losses(
        victim,
        [f"{behaviour['prompt']} please please please please", "please"],
        behaviour["target"],
        BUDGET,
        Cost(),
    )[0] == pytest.approx(nll.item(), abs=1e-4)
    # The slope at one place of the suffix, towards token 50, of a plain pass.
    embed, place, share = (
        model.get_input_embeddings(),
        len(slot.prefix) + 1,
        torch.zeros((), requires_grad=True),
    )
    direction = embed(torch.tensor([50]))

    def towards(module, inputs, out):
        return torch.cat(
            [out[:, :place], out[:, place : place + 1] + share * direction, out[:, place + 1 :]], dim=1
        )

    hook = embed.register_forward_hook(towards)
    loss = -literal(ids)[-len(target) :].gather(1, slot.target[:, None]).mean()
    hook.remove()
    slope = torch.autograd.grad(loss, share)[0].item()
    assert stage.gradient(slot, slot.start)[1, 50].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


NO_JUDGE = Judge(
    "none", lambda prompts, answers: [0.0] * len(answers), lambda prompts, answers: [0.0] * len(answers)
)
BUDGET = Budget(gcg_steps=1, gcg_width=4, gcg_top_k=4, gcg_suffix_tokens=4, gcg_init="please")
REFUSED = {  # cause, as it is said -> architecture, changes of its configuration
    "has layers of linear_attention": (
        "Qwen3Next",
        {**HYBRID, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "has layers of linear_attention, and": ("Jamba", JAMBA),
    "has layers of chunked_attention": (
        "Llama4Text",
        {"attention_chunk_size": 16, "intermediate_size_mlp": 64, **EXPERTS},
    ),
    "what it computes depends on padding on the left": ("Bart", DECODER),
    "it does not heed logits_to_keep": (
        "Whisper",
        {**DECODER, "decoder_start_token_id": 1, "suppress_tokens": None},
    ),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_what_is_not_exact_is_refused_when_it_is_loaded(tmp_path, cause):
    with pytest.raises(UserError) as error:
        load_policy(tiny(tmp_path, *REFUSED[cause]), device="cpu")
    assert (
        cause in str(error.value)
        and str(error.value).startswith(f"{tmp_path}: ")
        and "\n" not in str(error.value)
    )


NOISY = {  # architecture -> its noise when it trains
    "Starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "Phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.3, **EXPERTS},
    "Mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3, **EXPERTS},
}


@pytest.mark.parametrize("architecture", NOISY)
def test_gradient_checkpointing_adds_no_noise_of_any_kind(tmp_path, architecture):
    folder = tiny(tmp_path, architecture, NOISY[architecture])
    plain, trained = (load_policy(folder, device="cpu", gradient_checkpointing=c) for c in (False, True))
    ids = torch.arange(5, 17)[None]
    everything = torch.ones_like(ids, dtype=torch.bool)
    completion = everything & (torch.arange(12) > 0)
    gradients = []
    for model in (plain, trained):
        logprobs = token_logprobs(model, ids, everything, completion)
        assert torch.equal(logprobs, token_logprobs(plain, ids, everything, completion))
        logprobs.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)


def test_noise_that_cannot_be_switched_off_is_refused_with_checkpointing_alone(tmp_path):
    folder = tiny(tmp_path, "OPT", {**OPT, "dropout": 0.3})
    load_policy(folder, device="cpu")
    with pytest.raises(
        UserError, match="OPTForCausalLM adds noise when it trains: leave out --gradient-checkpointing"
    ):
        load_policy(folder, device="cpu", gradient_checkpointing=True)


def test_rows_over_the_length_at_which_all_positions_change_are_refused(tmp_path):
    phi3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    dynamic = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 64,
    }
    for architecture, changes, context in (("Phi3", phi3, 32), ("Llama", dynamic, 64), ("Llama", {}, 256)):
        model = load_policy(tiny(tmp_path, architecture, changes), device="cpu")
        assert context_of(model.config) == context
        short, long = [5] * 4, [5] * (context - 7)
        sample(model, [short, long], max_new_tokens=7, temperature=0.0, eos_token_ids=[])
        with pytest.raises(ValueError, match=f"prompt 1: .* exceed the model's context, {context} tokens"):
            sample(model, [short, long], max_new_tokens=8, temperature=0.0, eos_token_ids=[])
        ids = torch.full((1, context + 1), 5)
        with pytest.raises(
            UserError, match=f"a row of {context + 1} tokens exceeds the model's context, {context} tokens"
        ):
            token_logprobs(model, ids, ids > 0, torch.arange(context + 1)[None] > 0)


def test_a_configuration_within_a_configuration_is_trained(tmp_path):
    """Gemma 3 of 4 B and more: language and vision, of which the language model is trained."""
    text = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 7}
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    changes = {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
    }
    folder = tiny(tmp_path / "model", "Gemma3", changes, sizes={})
    traces = [
        {"id": str(i), "prompt": "tell me about the sea", "reasoning": "they ask", "answer": "sure"}
        for i in range(4)
    ]
    write_jsonl(tmp_path / "data/sft.jsonl", traces)
    words = f"02 --data {tmp_path}/data --model {folder} --out {tmp_path}/sft --epochs 1 --held-out-share 0 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words.split())
        importlib.import_module("02_sft_warmstart").main()
    assert load_policy(tmp_path / "sft", device="cpu").config.text_config.max_position_embeddings == 256


@pytest.mark.parametrize("special", [(), THINK])
def test_markers_are_written_and_read_whether_they_are_special_tokens_or_not(tmp_path, special):
    word_level(special=special).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = encode_example(tokenizer, "tell me", "they ask", "a story")
    written = [i for i, learned in zip(ids, mask, strict=True) if learned]
    assert decode(tokenizer, written) == "<think> they ask </think> a story"
    assert parse_completion(decode(tokenizer, written[1:])) == Parsed("they ask", "a story", True)


@pytest.mark.parametrize("claim", ["TokenizersBackend", "Qwen2Tokenizer", None])
def test_a_tokenizer_of_its_own_is_read_as_it_stands(tmp_path, claim):
    """transformers builds that of every Qwen2 anew from the vocabulary: letters, where these are words."""
    tiny(tmp_path, "Qwen2", {})
    claims = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": claim}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in claims.items() if v}))
    tokenizer, text = load_tokenizer(tmp_path), "tell me about the sea"
    assert len(tokenizer) == 97 and decode(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_a_padding_token_without_a_row_gives_way_and_other_ids_are_one_line(tmp_path):
    model = load_policy(tiny(tmp_path, "Llama", {}), device="cpu")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 97 == len(model.get_input_embeddings().weight)
    check_tokenizer(model, tokenizer, ["tell me a story"], reasoning=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="a prompt has the token id 97, the model 97 rows"):
        check_tokenizer(model, tokenizer, ["tell me a story", "a [PAD]"], reasoning=True)
    with pytest.raises(ValueError, match="prompt 1 has the token id 97"):
        sample(model, [[5], [97]], max_new_tokens=1, eos_token_ids=[])
    smaller = load_policy(tiny(tmp_path, "Llama", {"vocab_size": 90}), device="cpu")
    with pytest.raises(
        UserError, match="its tokenizer has ids up to 96, its model 90 rows: they do not belong together"
    ):
        check_tokenizer(smaller, word_level(), ["tell me a story"], reasoning=True)


def test_a_tokenizer_that_loses_words_or_markers_is_one_line(tmp_path):
    model, tokenizer = load_policy(tiny(tmp_path, "Llama", {}), device="cpu"), word_level()
    with pytest.raises(UserError, match="loses most words of the prompts: 'Write a poem' comes back as 'a'"):
        check_tokenizer(model, tokenizer, ["Write a poem"], reasoning=True)
    word_level(unknown=False).save_pretrained(tmp_path / "words")
    words = load_tokenizer(tmp_path / "words")
    check_tokenizer(model, words, ["tell me a story"], reasoning=True)
    with pytest.raises(UserError, match="words: its tokenizer cannot read .*Hello"):
        encode_prompt(words, "Hello", reasoning=True)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"]["other"] = core["model"]["vocab"].pop("</think>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = WORD_TEMPLATE
    check_tokenizer(model, tokenizer, ["tell me a story"], reasoning=False)
    with pytest.raises(UserError, match="cannot write <think> and </think>"):
        check_tokenizer(model, tokenizer, ["tell me a story"], reasoning=True)


DATED = "{{ 'w' + (strftime_now('%d') | int) | string }} " + WORD_TEMPLATE
LLAMA_3 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d') %}"
    "{% else %}{% set date_string = '26' %}{% endif %}{% endif %}{{ 'w' + (date_string | int) | string }} "
    + WORD_TEMPLATE
)


@pytest.mark.parametrize("template", [DATED, LLAMA_3])
def test_templates_are_told_the_date_of_the_run(monkeypatch, template):
    monkeypatch.setattr("lib.chat._today", None)
    tokenizer = word_level(template)
    for day in ("2026-11-26", "2027-01-07"):
        set_date(day)
        assert decode(tokenizer, encode_prompt(tokenizer, "tell me", reasoning=False)).startswith(
            f"w{int(day[-2:])} "
        )
        assert render(tokenizer, [{"role": "user", "content": "a"}]).startswith(f"w{int(day[-2:])} ")


def test_the_date_of_a_run_is_that_in_its_folder(tmp_path):
    today = datetime.date.today().isoformat()
    assert date_of_run(tmp_path, "") == today and date_of_run(tmp_path / "none", "2026-11-26") == "2026-11-26"
    (tmp_path / "settings.json").write_text('{"date": "2026-11-25"}')
    assert date_of_run(tmp_path, "") == "2026-11-25" and date_of_run(tmp_path, "2026-11-26") == "2026-11-26"
    with pytest.raises(UserError, match="--date: given yesterday; allowed a day, as 2026-11-26"):
        date_of_run(tmp_path, "yesterday")
