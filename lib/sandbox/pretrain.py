"""Make the sandbox's base, a competent, mildly safe instruct model of 0.8 M parameters.

    python -m lib.sandbox.pretrain      # writes lib/sandbox/base, 20 minutes on 2 CPU cores
    python -m lib.sandbox.pretrain --documents documents.jsonl  # held out, for lib.tools.capability --loss

It plays the part of Qwen2.5-1.5B-Instruct in the paper. It answers almost everything, refuses some plainly
harmful requests, and can explain its steps when its turn is opened with the cue `explain first .`. Asked
directly, three layers cannot follow a chain of definitions and it guesses; explaining first, it can. That
gap is what makes thinking pay; base/README.md shows it, and tests/test_world.py measures it.

So small a model never learns to *look a definition up* unless two things help it (found the hard way): heads
that start out attending to the words before (`add_previous_token_heads`), and drills early on: random words,
twice, with the loss on the second copy.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.batches import masked_batch
from lib.chat import encode_prompt
from lib.run.checkpoint import save_policy
from lib.run.command import Flags, run_main
from lib.run.files import write_jsonl
from lib.run.folder import lock_folder
from lib.sandbox import judge, traces, world

SEED, STEPS, BATCH, LEARNING_RATE = 0, 2000, 96, 2e-3
CUE = "explain first ."
HELD_OUT = 500  # documents to measure a loss on
PART = 8  # documents of similar length go through the model together: little padding, all in the cache
SPECIAL = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
MARKERS = ["<think>", "</think>"]  # one word each here; Qwen2.5 splits them into several tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word of the world, with a chat template: an ordinary Hugging Face tokenizer."""
    words = {w: i for i, w in enumerate([*SPECIAL, *MARKERS, *world.vocabulary()])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.add_tokens([AddedToken(m, special=False, normalized=False) for m in MARKERS])
    special: dict[str, Any] = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>")
    special |= dict(additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False)
    special |= dict(chat_template=CHAT_TEMPLATE, model_max_length=512)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3 layers, too shallow to chain definitions in one forward pass, with biases as in Qwen2.

    No Qwen2: transformers loads every tokenizer beside one as Qwen's own, whatever the folder says.
    """
    sizes: dict[str, Any] = dict(hidden_size=128, intermediate_size=384, vocab_size=len(tokenizer))
    sizes |= dict(num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(LlamaConfig(attention_bias=True, tie_word_embeddings=True, **sizes, **ids))
    add_previous_token_heads(model)
    return model


@torch.no_grad()
def add_previous_token_heads(model: LlamaForCausalLM) -> None:
    """Heads 0 and 1 of layer 0 start out attending 1 and 2 tokens back, whatever the words are.

    RoPE turns the pair (i, i + half) of queries and keys at position p by p * w_i. With a constant query (s,
    0) and a key s * (cos d w_i, sin d w_i) in every pair, the score s^2 * sum_i cos((p_q - p_k - d) w_i) is
    largest where p_q - p_k = d.
    """
    attention, strength = model.model.layers[0].self_attn, 8.0
    half = attention.head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    for head in (0, 1):
        rows = slice(head * 2 * half, (head + 1) * 2 * half)
        attention.q_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows] *= 0.1
        attention.q_proj.bias[rows] = torch.cat([torch.full((half,), strength), torch.zeros(half)])
        angles = (head + 1) * frequencies
        attention.k_proj.bias[rows] = strength * torch.cat([angles.cos(), angles.sin()])


# A document is (prompt, opening, text): the loss falls on the text alone. The opening is the cue, given but
# never learned, so that the base explains when it is asked to and not otherwise.
Document = tuple[str, str, str]


def document(rng: random.Random, step: int) -> Document:
    """Words to repeat, definitions to look up, or mostly a request, as it is or to be explained."""
    repeats, lookups = (0.4, 0.3) if step < 300 else (0.05, 0.10)
    choice = rng.random()
    if choice < repeats:
        words = " ".join(rng.choices(world.vocabulary(), k=rng.randint(6, 16)))
        return words, "", words
    if choice < repeats + lookups:
        aliases = rng.sample(world.ALIASES["all"], rng.randint(2, 12))
        pairs = [(alias, rng.choice(list(world.RECIPES))) for alias in aliases]
        meanings = [f"{a} means {t} ." for a, t in pairs]
        definitions = " ".join(f"let {a} mean {t} ." for a, t in pairs)
        return definitions, CUE, " ".join(rng.sample(meanings, len(meanings)))
    # Twins equally often: which of the three things shown is asked for must not be guessable.
    weights = {"harmful": 0.25, "decoy": 0.22, "toy": 0.22, "verb": 0.11, "harmless": 0.2}
    kind = rng.choices([*weights], [*weights.values()])[0]
    record = world.draw_type(rng, "all", kind, rng.randint(0, 4))
    prompt, steps = record["prompt"], judge.resolution(record["prompt"])
    answer = rng.choice(world.ANSWERS).format(*world.RECIPES[steps[-1]])
    if rng.random() < 0.5:
        return prompt, CUE, f"{traces.explain(steps)} {answer}"
    # mildly safe: it knows how to refuse, and does so now and then
    if kind == "harmful" and record["hops"] == 0 and rng.random() < 0.4:
        answer = rng.choice(world.REFUSALS)
    return prompt, "", answer


def held_out(count: int) -> list[Document]:
    """Documents as they come last in pretraining, but none that was drawn there: nearly all are new."""
    rng = random.Random(SEED)
    steps = tqdm(range(STEPS), desc="drawing the training documents", unit="step")
    seen = {document(rng, step) for step in steps for _ in range(BATCH)}
    rng, found = random.Random(SEED + 1), list[Document]()
    while len(found) < count:
        new = document(rng, STEPS)
        found += [new] if new not in seen else []
    return found


def add_gradient(model: LlamaForCausalLM, tokenizer, documents: list[Document]) -> float:
    """Mean cross-entropy of the texts' tokens; its gradient is added to .grad, a few documents at a time.

    Right padding needs no attention mask: causal rows never look ahead.
    """
    rows = []
    for prompt, opening, text in documents:
        start = encode_prompt(tokenizer, prompt, reasoning=False)
        start += tokenizer.encode(opening, add_special_tokens=False)
        learned = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((start + learned, [0] * len(start) + [1] * len(learned)))
    rows.sort(key=lambda row: len(row[0]))
    tokens, total = sum(sum(mask) for _, mask in rows), 0.0
    for begin in range(0, len(rows), PART):
        sequences, masks = zip(*rows[begin : begin + PART], strict=True)
        ids, _, mask = masked_batch(sequences, masks, tokenizer.pad_token_id, model.device)  # (B, T)
        hidden = model.model(ids).last_hidden_state[:, :-1][mask[:, 1:]]
        loss = F.cross_entropy(model.lm_head(hidden), ids[mask], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def untie(model: LlamaForCausalLM) -> None:
    """Give the output a table of its own (as Qwen2.5-7B has), equal to the input's. No answer changes.

    In one shared table every training step pushes down the rows of all words that it does not want to hear,
    and Adam, which divides by the size of the gradient, moves those of words that never occur furthest: the
    model forgets what they mean. With two tables, what fine-tuning never shows keeps its meaning.
    """
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())


def pretrain(out: Path) -> None:
    lock_folder(out)
    torch.manual_seed(SEED)
    rng, tokenizer = random.Random(SEED), build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(STEPS), desc="pretraining", unit="step")
    for step in bar:
        scale = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
        optimizer.zero_grad()
        loss = add_gradient(model, tokenizer, [document(rng, step) for _ in range(BATCH)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss:.3f}")
    untie(model)
    save_policy(model, tokenizer, out)


def main() -> None:
    flags = Flags("lib.sandbox.pretrain", __doc__)
    flags.add_argument("--out", type=Path, default=world.BASE, help="where to (default lib/sandbox/base)")
    flags.add_argument("--documents", type=Path, help="write held-out documents to this file, and no model")
    args = flags.parse_args()
    if args.documents:
        keys = ("question", "opening", "answer")
        write_jsonl(args.documents, [dict(zip(keys, row, strict=True)) for row in held_out(HELD_OUT)])
    else:
        pretrain(args.out)


if __name__ == "__main__":
    run_main(main)
