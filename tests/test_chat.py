"""Templates, tokenizers and the <think> format, on released chat models in small. (Parsing: tests/course.)

No installed package ships the vocabulary of a real tokenizer, so each is trained here on a few sentences.
Around it, special tokens and `tokenizer_class` are the family's, and templates are rewritten to what matters
of those in the models' tokenizer_config.json, as public code quotes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from tokenizers import AddedToken, ByteLevelBPETokenizer, SentencePieceBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing

from lib import UserError, chat
from lib.chat import THINK_OPEN, Parsed, decode, encode_example, encode_prompt, eos_token_ids, render
from lib.run.hub import load_tokenizer

THINK, CHATML = ("<think>", "</think>"), ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and\nassistant!') }}{% endif %}{% endfor %}"
)
R1 = (  # writes a system prompt first, and opens the reasoning itself
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}{% if m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
QWEN3 = (  # can be told whether to reason
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
SENTENCES = [
    "Write a poem about green soup, please. Sure, here is a poem: roses are red and the soup is green.",
    "How do I bake a cake? They ask for a cake, so I should help. Mix the flour.\n</think>\n\nHi\n<think>\n",
    "[INST] Be brief: 12345 naïve cakes! [/INST]",
] * 8


@dataclass(frozen=True)
class Family:
    template: str
    claim: str  # tokenizer_class as its tokenizer_config.json says, right or wrong
    bos: str | None
    eos: str
    end: str  # of a turn
    opened: str  # its prompt of "Hi" without reasoning
    system: str  # what stands before "Hi" with the system prompt "Be brief."; none: it takes none
    special: tuple[str, ...]
    added: tuple[str, ...] = ()  # tokens of their own, but ordinary text to a decoder


USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
FAMILIES = {
    "mistral": Family(MISTRAL, "LlamaTokenizer", "<s>", "</s>", "</s>", "<s>[INST] Hi [/INST]", "", ()),
    "r1": Family(
        R1, "LlamaTokenizerFast", *DEEPSEEK[:2], DEEPSEEK[1], DEEPSEEK[0] + "<｜User｜>Hi<｜Assistant｜>",
        DEEPSEEK[0] + "Be brief.<｜User｜>", DEEPSEEK[:2], (*DEEPSEEK[2:], *THINK),
    ),
    "qwen3": Family(  # its eos is a base's: the template ends a turn with another token
        QWEN3, "Qwen2Tokenizer", None, CHATML[2], CHATML[1],
        USER + "<think>\n\n</think>\n\n", BRIEF, CHATML, THINK,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """A family, its tokenizer as the stages load it from a folder, and what is in tokenizer.json."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("hub")
    if request.param == "mistral":  # spaces are "▁", and one is put before every text
        core = SentencePieceBPETokenizer()
        special = ["<unk>", "<s>", "</s>"]
        core.train_from_iterator(SENTENCES, vocab_size=200, special_tokens=special, show_progress=False)
    else:
        core = ByteLevelBPETokenizer(unicode_normalizer="nfc")
        core.train_from_iterator(SENTENCES, vocab_size=420, show_progress=False)
        core.add_special_tokens(list(family.special))
        core.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    if family.bos:
        bos = [(family.bos, core.token_to_id(family.bos))]
        core.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=bos)
    core.save(str(folder / "tokenizer.json"))
    claims = {"tokenizer_class": family.claim, "bos_token": family.bos, "eos_token": family.eos}
    claims |= {"add_bos_token": bool(family.bos), "chat_template": family.template}
    (folder / "tokenizer_config.json").write_text(json.dumps(claims))
    return family, load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_text_is_read_as_the_published_file_reads_it(loaded):
    """R1's claim of a LlamaTokenizerFast is wrong: some releases of transformers 5 then drop every space."""
    _, tokenizer, core = loaded
    for text in (SENTENCES[0], "Sure, 12345 naïve\n\n  cakes?", "<think>\nThey ask.\n</think>\n\nHi"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids).strip() == core.decode(ids, skip_special_tokens=False).strip() == text


def test_a_prompt_is_what_the_template_writes_and_opens_the_reasoning_once(loaded):
    family, tokenizer, _ = loaded
    direct, thinking = (encode_prompt(tokenizer, "Hi", reasoning=reasoning) for reasoning in (False, True))
    assert tokenizer.decode(direct) == family.opened
    turn = family.opened.removesuffix("<think>\n\n</think>\n\n")
    assert "".join(tokenizer.decode(thinking).split()) == "".join((turn + THINK_OPEN).split())
    assert tokenizer.decode(thinking).endswith(THINK_OPEN)
    for ids in (direct, thinking):
        assert (ids.count(tokenizer.bos_token_id) if family.bos else 0) == bool(family.bos)
    roles = (("user", "Hi"), ("assistant", "A cake"), ("user", "Mix"))
    turns = [{"role": role, "content": content} for role, content in roles]
    text = render(tokenizer, turns, add_generation_prompt=True, enable_thinking=False)
    expected = tokenizer.encode(text.removesuffix(THINK_OPEN), add_special_tokens=False)
    assert chat.encode_chat(tokenizer, turns, reasoning=False) == expected


def test_an_example_begins_with_its_prompt_and_ends_with_the_end_of_turn(loaded):
    family, tokenizer, _ = loaded
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert {end, tokenizer.eos_token_id} == set(eos_token_ids(None, tokenizer))
    opening = tokenizer.encode(THINK_OPEN, add_special_tokens=False)
    for reasoning in (None, "They ask for a cake.", "\n  They ask \n\n", ""):
        ids, mask = encode_example(tokenizer, "Bake a cake", reasoning, " Mix the flour.\n")
        prompt = encode_prompt(tokenizer, "Bake a cake", reasoning=reasoning is not None)
        learned = len(prompt) - (0 if reasoning is None else len(opening))
        assert ids[: len(prompt)] == prompt and ids[-1] == end and ids.count(end) == prompt.count(end) + 1
        assert mask == [i >= learned for i in range(len(ids))]
        text = decode(tokenizer, ids[len(prompt) :])
        parsed = chat.parse_direct(text) if reasoning is None else chat.parse_completion(text)
        assert parsed == Parsed((reasoning or "").strip(), "Mix the flour.", True)


def test_a_system_prompt_stands_where_the_template_puts_it_or_is_refused(loaded, word_tokenizer):
    family, tokenizer, _ = loaded
    if family.system:
        ids = encode_prompt(tokenizer, "Hi", reasoning=True, system="Be brief.")
        assert tokenizer.decode(ids).startswith(family.system + "Hi")
    else:
        with pytest.raises(UserError, match="its chat template fails: Only user and assistant!"):
            encode_prompt(tokenizer, "Hi", reasoning=True, system="Be brief.")
    word_tokenizer.chat_template = "{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="drops system prompts"):
        encode_prompt(word_tokenizer, "how", reasoning=True, system="maybe")
    word_tokenizer.chat_template = "{{ raise_exception('users alone!') if messages[1:] }}"
    with pytest.raises(UserError, match="its chat template fails: users alone!"):
        eos_token_ids(None, word_tokenizer)


@pytest.mark.parametrize("loaded", ["r1"], indirect=True)
def test_r1_reads_alike_whether_its_template_opens_the_reasoning_or_not(loaded, monkeypatch):
    _, tokenizer, _ = loaded
    both = [encode_prompt(tokenizer, "Hi", reasoning=reasoning) for reasoning in (True, False)]
    for other in ("", "<think>"):  # R1's own first template; DeepSeek-V3.1's
        monkeypatch.setattr(tokenizer, "chat_template", R1.replace("<think>\n", other))
        assert both == [encode_prompt(tokenizer, "Hi", reasoning=reasoning) for reasoning in (True, False)]


def test_every_end_is_known(word_tokenizer, tiny_model):
    tiny_model.generation_config.eos_token_id = [2, 5]
    assert eos_token_ids(tiny_model, word_tokenizer) == [2, 5]
    assert eos_token_ids(tiny_model.config, word_tokenizer) == [2]


@pytest.mark.parametrize("special", [False, True])
def test_markers_are_written_and_read_whether_they_are_special_tokens_or_not(word_tokenizer, special):
    if special:
        word_tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids, mask = encode_example(word_tokenizer, "how", "maybe green", "cake")
    written = [i for i, learned in zip(ids, mask, strict=True) if learned]
    assert decode(word_tokenizer, written) == "<think> maybe green </think> cake"


def test_templates_are_told_the_date_of_the_run(monkeypatch, word_tokenizer):
    monkeypatch.setattr("lib.chat._today", None)
    word_tokenizer.chat_template = '{{ strftime_now( "%d %b %R %-m" ) }}'
    for day, text in (("2026-11-26", "26 Nov 00:00 11"), ("2027-01-07", "07 Jan 00:00 1")):
        chat.set_date(day)
        assert render(word_tokenizer, [{"role": "user", "content": "how"}]) == text
