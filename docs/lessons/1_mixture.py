# %% [markdown]
# # Lesson 1: what the model reads
#
# A model that is paid for safety alone learns to refuse everybody.
# This lesson shows what keeps it from that: one scene, two traces, three mixtures, and a leak.
# The code is that of `01_build_mixture.py` and of the sandbox, whose words are made up.
# %%
import random
from collections import Counter

import matplotlib.pyplot as plt
from lesson import RUN, chapter, show, table

from lib.rewards import KINDS, total_reward
from lib.run.files import read_jsonl
from lib.run.text import same_prompt
from lib.sandbox import judge, traces, world

mixture = chapter("01_build_mixture")

# %% [markdown]
# ## One scene, three questions
# A scene names three things: a dangerous one, a harmless one, a toy. Each hides behind other words, here in
# two hops. Who asks for the harmless one is ambiguous, too: a dangerous one is defined beside it (a *decoy*).
# %%
scene = world.twin_scene(random.Random(1), "train", hops=2)
prompts = [scene.ask(i) for i in range(3)]
print(prompts[0])
differing = [set(words) for words in zip(*(prompt.split() for prompt in prompts), strict=True)]
print("\nwords that differ between the three prompts:", sum(len(words) > 1 for words in differing))
kinds = ["harmful", "ambiguous", "ambiguous"]
table("asked | means | kind", zip([c[0] for c in scene.chains], scene.things, kinds, strict=True))

# %% [markdown]
# ## A right trace and a wrong one
# A trace is a reasoning and an answer. The sandbox's teacher judges wrongly in half of them.
# The right one earns a reward of 1, whatever the kind. What is wrong depends on the kind.
# %%
rows = []
for prompt, kind in zip(prompts, kinds, strict=True):
    for verdict, share in (("right", 0.0), ("wrong", 1.0)):
        reasoning, answer = traces.write_trace({"prompt": prompt}, random.Random(5), wrong_verdicts=share)
        harm, task = judge.harm_score([prompt], [answer])[0], judge.task_score([prompt], [answer])[0]
        r = total_reward(kind, harm, task, well_formed=True)
        rows.append([kind, verdict, harm, task, r, f"{reasoning} | {answer}"])
table("kind | verdict | harm | task | r | reasoning and answer", rows)

# %% [markdown]
# ## The mixture
# Lambda is the share of harmful prompts. Two policies need no thought: refuse all, answer all.
# What would each earn?
# %%
settings = [mixture.Settings(lambda_harmful=i / 10, rl_prompts=1200) for i in range(11)]
mixtures = [mixture.prompts_needed(s) for s in settings]
refuse = {kind: total_reward(kind, 0.0, 0.0, True) for kind in KINDS}
comply = {kind: total_reward(kind, float(kind == "harmful"), 1.0, True) for kind in KINDS}
earned = [[sum(m[k] * policy[k] for k in KINDS) / 1200 for policy in (refuse, comply)] for m in mixtures]
rows = [[i / 10, *mixtures[i].values(), *earned[i]] for i in (1, 5, 9)]
table("lambda | harmful | harmless | ambiguous | refuse all | answer all", rows)

# %%
plt.plot([s.lambda_harmful for s in settings], earned, label=["refuse all", "answer all"])
plt.axhline(1, color="black", linestyle="--", label="find out first which it is")
show(xlabel="lambda, share of harmful prompts", ylabel="mean reward", ylim=(0, 1.1))

# %% [markdown]
# ## A planted leak
# Evaluation takes its prompts first. Whoever comes later goes without them.
# Other capitals, spaces and marks do not hide a prompt.
# %%
evaluation, rl = read_jsonl(RUN / "data/eval_ambiguous.jsonl"), read_jsonl(RUN / "data/rl.jsonl")
taken, leak = mixture.Taken(), {"prompt": f"  {evaluation[0]['prompt'].upper()} !"}
taken.take(evaluation, "evaluation")
print(f"kept for RL: {len(taken.take([leak, *rl], 'RL'))} of {1 + len(rl)}; left out: {dict(taken.dropped)}")
print("kinds in rl.jsonl:", dict(Counter(record["kind"] for record in rl)))
found, known = ({same_prompt(record["prompt"]) for record in records} for records in (rl, evaluation))
print("prompts in both files:", len(found & known))

# %% [markdown]
# **A question.** A leak in other words, say with `zog` for `wip`, would pass. How would you find it?
# And at which lambda is refusing everybody hardest to tell from thinking?
