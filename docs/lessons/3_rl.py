# %% [markdown]
# # Lesson 3: from one prompt to a gradient, by the functions of `03_rl_train.py`
# First the run's settings and prompts, and pi_SFT twice: the policy, and the frozen reference.
# %%
import torch
from lesson import RUN, chapter, settings_of, show_report, table

from lib.run.data import groups_of
from lib.run.files import read_jsonl
from lib.run.plumbing import Run

rl, metrics = chapter("03_rl_train"), read_jsonl(RUN / "rl/metrics.jsonl")
settings = settings_of(rl, RUN / "rl", model=str(RUN / "sft"))
run, tokenizer, judge = Run(settings), rl.load_tokenizer(settings.model), rl.load_judge(settings.judge)
policy, reference = run.model(settings.model), run.model(settings.model, frozen=True)
prompts, pad_id, G = rl.load_prompts(run, tokenizer, policy), tokenizer.pad_token_id, settings.group_size
adamw = {**run.adamw, "lr": metrics[0]["learning_rate"]}


def rollouts_of(model, step):  # steps 1 to 4 of the algorithm
    chosen = rl.items_of_step(prompts, step, settings.prompts_per_step, settings.seed)
    rollouts = rl.collect_rollouts(model, tokenizer, chosen, step, settings, run)
    rl.score_rollouts(rollouts, judge)
    rl.assign_advantages(rollouts, settings)
    return rollouts


# %% [markdown]
# ## One group
# The group of step 0 nearest to half right; behind the bar one sample. (Another danger's recipe is harm.)
# %%
groups = groups_of(rollouts_of(policy, 0), G)
which = min(range(len(groups)), key=lambda i: abs(sum(r.reward for r in groups[i]) - G / 2))
group, *batch = next(run.micro_batches(groups[which], pad_id, 2**20))  # ids, attention mask, mask: (G, T)
words, seam = tokenizer.convert_ids_to_tokens(group[0].ids), group[0].mask.index(True)
shown = [f"{word}/{i}" for word, i in zip(words, group[0].ids, strict=True)]
print(group[0].record["kind"], ": ...", *shown[seam - 12 : seam], "|", *shown[seam:], "\n")
rows = [[int(r.parsed.well_formed), r.harm, r.task, r.reward, r.advantage, r.text] for r in group]
table("r_f | harm | task | r | A | completion", rows)

# %% [markdown]
# ## The loss, and one update
# At first ratio 1, KL 0, and yet a gradient. Below, the first completion's tokens after the update.
# %%
mask, A, T = batch[2], torch.tensor([r.advantage for r in group]), {"temperature": settings.temperature}
old, ref = (rl.token_logprobs(model, *batch, **T).detach() for model in (policy, reference))  # (G, T)
rest = (A, mask, rl.sequence_weights(mask.sum(1), int(mask.sum()), G, settings), settings)
optimizer = torch.optim.AdamW(policy.parameters(), **adamw)
loss = rl.grpo_loss(rl.token_logprobs(policy, *batch, **T), old, ref, *rest)
loss.backward()
norm, new = run.clip_and_step(optimizer, loss.item()), rl.token_logprobs(policy, *batch, **T).detach()
print(f"loss {loss:.4f}, after the update {rl.grpo_loss(new, old, ref, *rest):.4f}; gradient {norm:.2f}\n")
columns = [x[0][mask[0]] for x in (new, old, ref, (new - old).exp(), 1000 * rl.k3(ref - new))]
table("token | new | old | ref | ratio | kl x 1000", zip(words[seam:], *columns, strict=True))
table("A | log pi before | after | change", zip(A, old.sum(1), new.sum(1), (new - old).sum(1), strict=True))

# %% [markdown]
# ## The first, a middle and the last step
# The middle is the run's first quarter, done again: a step depends on its number and the seed alone.
# %%
show_report("log", metrics)
models = {"first": reference, "middle": run.model(settings.model), "last": run.model(str(RUN / "rl"))}
optimizer = torch.optim.AdamW(models["middle"].parameters(), **adamw)
for step in range(-(-len(metrics) // 4)):
    optimizer.param_groups[0]["lr"] = metrics[step]["learning_rate"]
    rollouts = rollouts_of(models["middle"], step)
    rl.update_policy(models["middle"], reference, optimizer, rollouts, pad_id, settings, run)
same = {name: groups_of(rollouts_of(model, 0), G)[which] for name, model in models.items()}
table("step | r | completion", [[name, r.reward, r.text] for name in same for r in same[name]])

# %% [markdown]
# ## What changes if one thing is wrong
# Sixteen updates on that group. The gap: how far the learned log-probabilities are from the sampled ones.
# %%
rows, changes = [], {"as it is": {}, "half temperature": {"temperature": settings.temperature / 2}}
changes |= {"no KL": {"kl_coef": 0.0}, "no std": {"std_normalisation": False}}
for name, change in changes.items():
    changed, model = settings_of(rl, RUN / "rl", **change), run.model(settings.model)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    again = groups_of(rollouts_of(model, 0), G)[which]
    rl.assign_advantages(again, changed)
    stats = [rl.update_policy(model, reference, optimizer, again, pad_id, changed, run) for _ in range(16)]
    moved = (rl.token_logprobs(model, *batch, **T).detach() - old).sum(1)
    found = [max(r.advantage for r in again), stats[0]["grad_norm"], stats[0]["sampler_gap"], stats[-1]["kl"]]
    rows.append([name, *found, moved[A > 0].mean(), moved[A < 0].mean()])
table("variant | best A | gradient | gap | KL at the end | change of log pi, A > 0 | A < 0", rows)

# %% [markdown]
# **A question.** Adam forgets how long a gradient is. So what does the std do in a batch of many groups?
# A token that completions share gets the sum of their advantages. What if wrong and right ones begin alike?
