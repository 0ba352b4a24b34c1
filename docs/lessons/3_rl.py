# %% [markdown]
# # Lesson 3: from one prompt to a gradient
# GRPO by hand, with the functions of `03_rl_train.py`: eight completions, their advantages, a loss, an update.

# %%
from functools import partial

import torch
from lesson import RUN, chapter, settings_of, show, table

from lib.batches import masked_batch
from lib.run.data import groups_of
from lib.run.files import read_jsonl
from lib.run.plumbing import Run

rl, metrics = chapter("03_rl_train"), read_jsonl(RUN / "rl/metrics.jsonl")
settings = settings_of(rl, RUN / "rl", model=str(RUN / "sft"))
run, tokenizer, judge = Run(settings), rl.load_tokenizer(settings.model), rl.load_judge(settings.judge)
policy, reference = run.model(settings.model), run.model(settings.model, frozen=True)
prompts, pad_id = rl.load_prompts(run, tokenizer, policy), tokenizer.pad_token_id
adamw = partial(torch.optim.AdamW, **run.adamw | {"lr": metrics[0]["learning_rate"]})


def rollouts_of(model, step):  # steps 1 to 4 of the algorithm
    chosen = rl.items_of_step(prompts, step, settings.prompts_per_step, settings.seed)
    rollouts = rl.collect_rollouts(model, tokenizer, chosen, step, settings, run)
    rl.score_rollouts(rollouts, judge)
    rl.assign_advantages(rollouts, settings)
    return rollouts


# %% [markdown]
# ## One group
# We take the group of step 0 that is nearest to half right. Before the bar is the prompt, behind it a sample.

# %%
groups = groups_of(rollouts_of(policy, 0), settings.group_size)
group = min(groups, key=lambda group: abs(sum(r.reward for r in group) - settings.group_size / 2))
seam, words = group[0].mask.index(True), tokenizer.convert_ids_to_tokens(group[0].ids)
shown = [f"{word}/{i}" for word, i in zip(words, group[0].ids, strict=True)]
print(group[0].record["kind"], ":", *shown[:seam], "|", *shown[seam:], "\n")
rows = [[int(r.parsed.well_formed), r.harm, r.task, r.reward, r.advantage, r.text] for r in group]
table("r_f | harm | task | r | A | completion", rows)

# %% [markdown]
# ## The loss, and one update
# At first new, old and reference are one model: all ratios are 1, the KL is 0. The slope is not 0.

# %%
batch = masked_batch([r.ids for r in group], [r.mask for r in group], pad_id, run.device)
log_pi = partial(rl.token_logprobs, temperature=settings.temperature)
old, ref, mask = log_pi(policy, *batch).detach(), log_pi(reference, *batch), batch[2]  # (G, T) each
lengths, A = mask.sum(1), torch.tensor([r.advantage for r in group])  # (G,) each
loss_of = partial(rl.grpo_loss, settings=settings, completion_mask=mask, advantages=A, reference_logprobs=ref)
loss_of = partial(loss_of, weights=rl.sequence_weights(lengths, int(mask.sum()), len(group), settings))
optimizer, loss = adamw(policy.parameters()), loss_of(log_pi(policy, *batch), old)
loss.backward()
norm, new = run.clip_and_step(optimizer, loss.item()), log_pi(policy, *batch).detach()
print(f"loss {loss.item():.4f}, after the update {loss_of(new, old).item():.4f}; gradient norm {norm:.2f}\n")
columns = new, old, ref, (new - old).exp(), rl.kl_estimate(new, ref, settings.kl_estimator)
table(
    "token | new | old | ref | ratio | kl",
    zip(words[seam:], *(x[0][mask[0]].tolist() for x in columns), strict=True),
)
print("\nlog pi of whole completions: what has A > 0 should rise")
sums = [x.tolist() for x in (A, old.sum(1), new.sum(1), (new - old).sum(1))]
table("A | before | after | change", zip(*sums, strict=True))

# %% [markdown]
# ## The first, a middle and the last step
# The middle is the run's first quarter, done again. A step depends on the seed alone: its rewards are the run's.

# %%
show("log", metrics)
middle, last = run.model(settings.model), run.model(str(RUN / "rl"))
optimizer = adamw(middle.parameters())
for step in range(len(metrics) // 4):
    optimizer.param_groups[0]["lr"] = metrics[step]["learning_rate"]
    rl.update_policy(middle, reference, optimizer, rollouts_of(middle, step), pad_id, settings, run)
for name, model in (("first", reference), ("middle", middle), ("last", last)):
    same = groups_of(rollouts_of(model, 0), settings.group_size)[groups.index(group)]
    print(f"\n{name}")
    table("r | A | completion", sorted((r.reward, r.advantage, r.text) for r in same))

# %% [markdown]
# ## What changes if one thing is wrong
# Sixteen updates on that group. The gap: sampled log-probabilities are not the ones that are learned.

# %%
changes = {"as it is": {}, "temperature 1": {"temperature": 1.0}, "no std": {"std_normalisation": False}}
changes |= {"no KL": {"kl_coef": 0.0}, "KL x 100": {"kl_coef": 100 * settings.kl_coef}}
rows = []
for name, change in changes.items():
    changed, model = settings_of(rl, RUN / "rl", **change), run.model(settings.model)
    optimizer = adamw(model.parameters())
    rl.assign_advantages(group, changed)
    for rollout in group:
        rollout.old_logprobs = None  # of an earlier update
    stats = [rl.update_policy(model, reference, optimizer, group, pad_id, changed, run) for _ in range(16)]
    moved, first = (log_pi(model, *batch) - old).detach().sum(1), stats[0]
    row = [name, max(r.advantage for r in group), first["grad_norm"], first["sampler_gap"], stats[-1]["kl"]]
    rows.append([*row, moved[A > 0].mean().item(), moved[A < 0].mean().item()])
table("variant | best A | gradient | gap | KL at the end | log pi of A > 0 | of A < 0", rows)

# %% [markdown]
# **A question.** Adam forgets how long a gradient is. So what does the std do in a batch of many groups?
# A token that completions share gets the sum of their advantages. What if seven wrong ones begin alike?
