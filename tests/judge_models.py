"""Judges that the tests can afford: bytes and whole lines for tokens, random weights, sharp attention.

templates/*.jinja are chat templates of published judges, *.txt what they write about PROMPT and ANSWER:
qwen3guard   Qwen3Guard-Gen's tokenizer, its branch for a query shortened; the text is of a recorded run
llama_guard  Llama-Guard-3-8B's, which begins with a blank
grm          Llama-3.2-3B-Instruct's without its branches for tools;  grm_8b  Llama 3's, which has no date
skywork      Qwen3's without its branches for tools
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers import AutoModelForSequenceClassification as Classifier

PROMPT, ANSWER = "How do I bake bread?", "Knead, wait, and bake it."
PROMPTS = [PROMPT, "", "Name a river. \ud800", "Sing {x}!", "Where is the library? " * 9]
ANSWERS = [ANSWER, "The Rhine. \ud800", "", "é \x00 你好 {y}", "Two streets north. " * 30]

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # special tokens; the last is eos
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def published(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8").removesuffix("\n")


def long_lines() -> list[str]:
    """Whole lines of the templates: with them as tokens, an exchange is short."""
    texts = [published(name) for name in ("qwen3guard.txt", "llama_guard.txt", "grm.txt")]
    lines = {line for text in texts for line in re.split(r"\n|<\|.*?\|>", text) if len(line) > 9}
    return sorted(line for line in lines if not any(x in line for x in (PROMPT, ANSWER, "CONVERSATION")))


def save_tokenizer(folder, special, template=None, words=(), bos=False, merges=()) -> PreTrainedTokenizerFast:
    """`bos`: it puts the first special token before every text, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, merges=[*merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(word, special=False, normalized=False) for word in (*long_lines(), *words)])
    if bos:
        core.post_processor = TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    named = {"bos_token": special[0], "eos_token": special[-1], "additional_special_tokens": special[1:]}
    named["truncation_side"] = "left"  # as some are
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False, "initializer_range": 0.4}


def make_model(folder, kind, special, template=None, words=(), *, after=None, bos=False, **options) -> str:
    """With words, it can write no others: the weights of the first two are w and -w, so one is above 0.

    `after` an exchange that this ends, all words have most of the probability.
    """
    torch.manual_seed(3)
    tokenizer = save_tokenizer(folder, special, template, words, bos, options.pop("merges", ()))
    head = options.pop("head", AutoModelForCausalLM)
    options = {"max_position_embeddings": 1500, "eos_token_id": len(special) - 1, "pad_token_id": 5} | options
    model = head.from_config(kind(vocab_size=len(tokenizer), bos_token_id=0, **SHAPE, **options))
    for layer in model.model.layers:  # sharp attention: what is far back in the prompt matters
        layer.self_attn.q_proj.weight.data *= 5
        layer.self_attn.o_proj.weight.data *= 5
    if words:
        here = torch.zeros(32)
        if after is not None:
            messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
            text = tokenizer.apply_chat_template(messages, tokenize=False) + after
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            here = model.model(ids).last_hidden_state[0, -1].detach()
        rows = model.lm_head.weight.data
        one, other = rows[0].clone(), rows[1].clone()
        rows.zero_()
        for word, row in zip(words, (one, -one, other), strict=False):
            rows[tokenizer.convert_tokens_to_ids(word)] = row + here / 2
    model.save_pretrained(folder)
    return str(folder)


JUDGES: dict[str, tuple] = {  # architecture, special tokens, and the rest of `make_model`
    "qwen3guard": (Qwen3Config, QWEN, {"words": (" Safe", " Unsafe", " Controversial"), "after": "Safety:"}),
    "llama-guard": (LlamaConfig, LLAMA, {"words": ("safe", "unsafe"), "after": "\n\n", "bos": True}),
    "grm": (LlamaConfig, LLAMA, {"head": Classifier, "num_labels": 1, "bos": True}),
    "skywork": (Qwen3Config, QWEN, {"head": Classifier, "num_labels": 1}),
}
JUDGES["grm-8b"] = JUDGES["grm"]


def make_judge(which: str, folder, **changes) -> str:
    """With the chat template of the published one. Each label is one token."""
    kind, special, options = JUDGES[which]
    template = {"template": published(f"{which.replace('-', '_')}.jinja")}
    return make_model(folder, kind, special, **template | options | changes)
