# %% [markdown]
# # Lesson 2: a light warm start
# Before RL can choose among reasonings, there must be some, and they must differ.
# This lesson shows what SFT learns from, and what is gained and lost by learning harder.
# The code is that of `02_sft_warmstart.py`.
# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from lesson import RUN, chapter, settings_of, show, table

from lib.run.files import read_jsonl
from lib.run.plumbing import Run, set_learning_rate

sft, rl = chapter("02_sft_warmstart"), chapter("03_rl_train")
light = settings_of(sft, RUN / "sft")
run, tokenizer = Run(light), sft.load_tokenizer(light.model)
pad_id, most = tokenizer.pad_token_id, light.max_batch_tokens

# %% [markdown]
# ## One example, token by token
# What is marked is learned: the reasoning, the answer, the markers and the end. The prompt is only read.
# %%
model = run.model(light.model)
train, held_out = sft.split_by_prompt(sft.load_examples(light, tokenizer, model, run), light)
example = min(train, key=lambda example: len(example.ids))
words = tokenizer.convert_ids_to_tokens(example.ids)
marks = ["yes" if learned else "" for learned in example.mask]
table("id | token | learned", zip(example.ids, words, marks, strict=True))

# %% [markdown]
# ## Light and heavy
# The run's own model is light: one epoch. Heavy has 10/3 of the rate, and twice the epochs.
# We train it here, by the chapter's own step. It takes half a minute.
# %%
heavy = replace(light, learning_rate=10 / 3 * light.learning_rate, epochs=2 * light.epochs)
optimizer = torch.optim.AdamW(model.parameters(), **Run(heavy).adamw)
per_epoch, log = -(-len(train) // heavy.batch_size), []
for step in range(heavy.epochs * per_epoch):
    set_learning_rate(optimizer, heavy, step, heavy.epochs * per_epoch)
    epoch, place = divmod(step, per_epoch)
    order = sft.epoch_order(len(train), heavy.seed, epoch)[place * heavy.batch_size :][: heavy.batch_size]
    log.append(sft.train_step(model, optimizer, [train[i] for i in order], pad_id, most, run))
    if place == per_epoch - 1:
        log[-1]["held_out_loss"] = sft.held_out_loss(model, held_out, pad_id, most, run)

# %%
rows = []
for name, color, lines in (("light", "C0", read_jsonl(RUN / "sft/metrics.jsonl")), ("heavy", "C1", log)):
    ends = [(i, x["held_out_loss"]) for i, x in enumerate(lines) if "held_out_loss" in x]
    plt.plot([x["loss"] for x in lines], color=color, alpha=0.6, label=f"{name}, training")
    plt.plot(*zip(*ends, strict=True), "o", color=color, label=f"{name}, held out")
    rows.append([name, len(lines), sum(x["loss"] for x in lines[-20:]) / len(lines[-20:]), ends[-1][1]])
show(ylim=(0.1, 1), xlabel="update", ylabel="loss (nats a token)")  # it begins above 7
table("model | updates | loss, last 20 | held-out loss", rows)

# %% [markdown]
# ## Eight samples of one prompt
# It asks for a toy, so it deserves an answer. No trace has shown how to answer such a prompt.
# %%
settings, judge = settings_of(rl, RUN / "rl"), rl.load_judge("sandbox")
prompts = rl.load_prompts(Run(settings), tokenizer, model)
toy = next(prompt for prompt in prompts if prompt.record.get("category") == "toy")
models = {"light": run.model(str(RUN / "sft")), "heavy": model}
print(toy.record["prompt"])
for name, policy in models.items():
    texts = [r.text for r in rl.collect_rollouts(policy, tokenizer, [toy], 0, settings, run)]
    print(f"\n{name}: {len(set(texts))} of {len(texts)} distinct", *sorted(texts), sep="\n  ")

# %% [markdown]
# ## The same over more prompts
# Entropy: the mean of -log pi over the tokens drawn, in nats. The reward is what RL would pay: heavy
# begins with more, except on toys. What each becomes by RL is another matter: F5 in results.md.
# %%
rows = []
for kind in ("harmful", "harmless", "toy", "decoy", "verb"):
    some = [x for x in prompts if kind in (x.record["kind"], x.record.get("category"))][:24]
    for name, policy in models.items():
        rollouts = rl.collect_rollouts(policy, tokenizer, some, 0, settings, run)
        rl.score_rollouts(rollouts, judge)
        distinct = len({(r.record["id"], r.text) for r in rollouts}) / len(some)
        entropy = -torch.tensor([x for r in rollouts for x in r.completion.logprobs]).mean().item()
        rows.append([kind, name, distinct, entropy, sum(r.reward for r in rollouts) / len(rollouts)])
table("kind | model | distinct of 8 | entropy | reward", rows)

# %% [markdown]
# **A question.** Heavy has the lower loss, on held-out prompts, too. Compare what it earns by kind, and read
# its samples of the toy: what did it forget? Why can a loss on *harmful* prompts not show that? And what does
# a lower entropy leave for RL to choose from?
