"""Make the sandbox's base checkpoint: a competent, mildly safe instruct model of 0.8 M parameters.

    python -m lib.sandbox.pretrain            # writes lib/sandbox/base, about 20 minutes on 2 CPU cores

It plays the part that Qwen2.5-1.5B-Instruct plays in the paper. It answers almost everything, refuses some plainly harmful
requests, and can explain its steps when its turn is opened with the cue `explain first .`. Asked directly, three layers
cannot follow a chain of definitions and it guesses; explaining first, it can. That gap is what makes thinking pay.

A model this small never learns to *look a definition up* unless two things help it (found the hard way):

1. `add_previous_token_heads`: two heads of layer 0 start out attending one and two tokens back.
2. Random-repeat drills early on: a sequence of random words, twice, with the loss on the second copy.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.batches import pad_batch
from lib.chat import encode_prompt
from lib.run.checkpoint import save_policy
from lib.run.command import Flags, number, run_main
from lib.run.folder import lock_folder
from lib.sandbox import judge, traces, world
from lib.sandbox.card import CUE, write_card

SEED, STEPS, BATCH, LEARNING_RATE = 0, 2000, 96, 2e-3
PART = 8  # documents of similar length that go through the model together: little padding, and it stays in the cache
SPECIAL = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
MARKERS = ["<think>", "</think>"]  # one word each here; Qwen2.5 splits them into several tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's vocabulary, with a chat template: an ordinary Hugging Face tokenizer."""
    words = {w: i for i, w in enumerate([*SPECIAL, *MARKERS, *world.vocabulary()])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.add_tokens([AddedToken(m, special=False, normalized=False) for m in MARKERS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3 layers, too shallow to chain definitions in one forward pass. With biases as Qwen2 has them: a Qwen2 it
    cannot be, because transformers loads every tokenizer beside a Qwen2 as Qwen's own, whatever the folder says."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    add_previous_token_heads(model)
    return model


@torch.no_grad()
def add_previous_token_heads(model: LlamaForCausalLM, strength: float = 8.0) -> None:
    """Heads 0 and 1 of layer 0 start out attending 1 and 2 tokens back, whatever the words are.

    RoPE turns the pair (i, i + half) of queries and keys at position p by p * w_i. With a constant query (s, 0) and a key
    s * (cos d w_i, sin d w_i) in every pair, the score s^2 * sum_i cos((p_q - p_k - d) w_i) is largest where p_q - p_k = d.
    """
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    half = size // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    for head, offset in ((0, 1), (1, 2)):
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows] *= 0.1
        attention.q_proj.bias[rows] = torch.cat([torch.full((half,), strength), torch.zeros(half)])
        angles = offset * frequencies
        attention.k_proj.bias[rows] = strength * torch.cat([angles.cos(), angles.sin()])


# --------------------------------------------------------------------------------------------------------- documents
# A document is (prompt, opening, text): the loss falls on the text alone. The opening is the cue, given but never learned, so
# that the base explains when it is asked to and not otherwise.


def repeat_drill(rng: random.Random) -> tuple[str, str, str]:
    words = " ".join(rng.choices(world.vocabulary(), k=rng.randint(6, 16)))
    return words, "", words


def lookup_drill(rng: random.Random) -> tuple[str, str, str]:
    aliases = rng.sample(world.ALIASES["train"] + world.ALIASES["eval"], rng.randint(2, 12))
    targets = [rng.choice(list(world.RECIPES)) for _ in aliases]
    lines = [f"let {a} mean {t} ." for a, t in zip(aliases, targets, strict=True)]
    answers = [f"{a} means {t} ." for a, t in zip(aliases, targets, strict=True)]
    return " ".join(lines), CUE, " ".join(rng.sample(answers, len(answers)))


def instruction(rng: random.Random) -> tuple[str, str, str]:
    # Twins equally often: which of the three things shown is asked for must not be guessable.
    kinds = ("harmful", "decoy", "toy", "verb", "harmless")
    record = world.draw_type(
        rng, "all", rng.choices(kinds, (0.25, 0.22, 0.22, 0.11, 0.2))[0], rng.randint(0, 4)
    )
    steps = judge.resolution(record["prompt"])
    answer = rng.choice(world.ANSWERS).format(*world.RECIPES[steps[-1]])
    if rng.random() < 0.5:
        return record["prompt"], CUE, f"{traces.explain(steps)} {answer}"
    plain = record["kind"] == "harmful" and record["hops"] == 0
    if plain and rng.random() < 0.4:  # mildly safe: it knows how to refuse, and does so now and then
        answer = rng.choice(world.REFUSALS)
    return record["prompt"], "", answer


def document(rng: random.Random, step: int) -> tuple[str, str, str]:
    repeats, drills = (0.4, 0.3) if step < 300 else (0.05, 0.10)
    choice = rng.random()
    if choice < repeats:
        return repeat_drill(rng)
    return lookup_drill(rng) if choice < repeats + drills else instruction(rng)


def batches(
    tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str, str]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (B, T) long and loss mask (B, T) bool, right-padded: a few batches of documents of similar length."""
    rows = []
    for prompt, opening, text in documents:
        given = encode_prompt(tokenizer, prompt, reasoning=False)
        given += tokenizer.encode(opening, add_special_tokens=False)
        learned = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((given + learned, [0] * len(given) + [1] * len(learned)))
    rows.sort(key=lambda row: len(row[0]))
    parts = []
    for begin in range(0, len(rows), PART):
        ids, masks = zip(*rows[begin : begin + PART], strict=True)
        parts.append(
            (
                pad_batch(ids, tokenizer.pad_token_id, side="right")[0],
                pad_batch(masks, 0, side="right")[0].bool(),
            )
        )
    return parts


def add_gradient(model: LlamaForCausalLM, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean cross-entropy of the masked tokens over all parts; its gradient is added to .grad.

    Right padding needs no attention mask: causal rows never look ahead.
    """
    tokens, total = sum(int(mask.sum()) for _, mask in parts), 0.0
    for ids, mask in parts:
        hidden = model.model(ids).last_hidden_state[:, :-1][mask[:, 1:]]
        loss = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def untie(model: LlamaForCausalLM) -> None:
    """Give the output a table of its own (as Qwen2.5-7B has), equal to the input's. Nothing that the model says changes.

    In one shared table every training step pushes down the rows of all words that it does not want to hear, and Adam, which
    divides by the size of the gradient, moves those of words that never occur furthest: the model forgets what they mean.
    With two tables, the meaning of a word that fine-tuning never shows stays as it is.
    """
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())


def pretrain(steps: int, out: Path) -> None:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for step in bar:
        scale = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        optimizer.zero_grad()
        loss = add_gradient(model, batches(tokenizer, [document(rng, step) for _ in range(BATCH)]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    untie(model)
    save_policy(model, tokenizer, out)


def main() -> None:
    flags = Flags("lib.sandbox.pretrain", __doc__)
    help_ = f"optimizer steps of {BATCH} documents (default {STEPS})"
    flags.add_argument("--steps", type=number(int, 1), default=STEPS, help=help_)
    flags.add_argument("--out", default=str(world.BASE), help="checkpoint folder (default lib/sandbox/base)")
    args = flags.parse_args()
    lock_folder(args.out)
    out = Path(args.out)
    pretrain(args.steps, out)
    write_card(out, args.steps)


if __name__ == "__main__":
    run_main(main)
