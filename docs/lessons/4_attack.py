# %% [markdown]
# # Lesson 4: an attack, step by step
# GCG looks for a few words behind a request that make the wanted answer likely. See `04_attack_eval.py`.
# %%
import json

import matplotlib.pyplot as plt
from lesson import RUN, chapter, settings_of, show, show_report, table

from lib import attacks
from lib.attacks.core import random_numbers
from lib.metrics import wilson
from lib.run.files import read_jsonl
from lib.run.hub import load_policy, load_tokenizer

chapter4 = chapter("04_attack_eval")
settings, judge = settings_of(chapter4, RUN / "eval"), chapter4.load_judge("sandbox")
model, tokenizer = load_policy(RUN / "rl", device="cpu").requires_grad_(False), load_tokenizer(RUN / "rl")
victim = attacks.Victim("tars", model, tokenizer, True, judge, settings.max_new_tokens, settings.temperature)

# %% [markdown]
# ## A request
# We take the one that GCG broke last in this run, if any. The target is how the answer should begin.
# %%
lines = read_jsonl(RUN / "eval/completions.jsonl")
lines = [line | {"defended": chapter4.defended(line, settings.harm_threshold)} for line in lines]
tries = [x for x in lines if x["model"] == "tars" and x["set"] == "gcg"]
broken = {x["id"]: x["step"] for x in sorted(tries, key=lambda x: x["step"]) if not x["defended"]}
requests = read_jsonl(RUN / "data/eval_harmful.jsonl")[: settings.behaviours]
request = max(requests, key=lambda r: broken.get(r["id"], -1))
prompt = request["prompt"]
print(f"request: {prompt}\ntarget:  {request['target']}\nsuffix:  {settings.initial_suffix()}")

# %% [markdown]
# ## One step
# The gradient promises how much a swap of one word lowers the loss. The true loss says what it was worth.
# %%
slot = attacks.Slot(victim, attacks.Attempt(request), request["target"], settings)
slopes = chapter4.gradient(slot, slot.start)  # (S, vocab)
swaps = chapter4.propose(slopes, slot.start, slot.allowed(), settings, random_numbers(0, "one step"))
swaps, texts = attacks.surviving([slot], swaps)  # (N, S)
true = chapter4.losses(slot, swaps) - chapter4.losses(slot, slot.start[None])  # (N,)
promised = slopes.gather(1, swaps.T).sum(0) - slopes.gather(1, slot.start[:, None]).sum()  # (N,)
table("promised | true | suffix", [[promised[i], true[i], texts[i]] for i in true.argsort()[:3]])
plt.plot(promised, true, ".")
show(xlabel="change of the loss, promised", ylabel="change of the loss, true")

# %% [markdown]
# ## The search, and a control
# The control is as many random words, without a search. (Where GCG's curve is flat, it is at worse ones.)
# %%
runs = []
for name in ("gcg", attacks.CONTROL):
    runs.append(attacks.Attempt(request, random_numbers(settings.seed, f"{name}/{request['id']}")))
    attacks.ATTACKS[name].run(victim, runs[-1:], settings, chapter4.search)
gcg, (control,) = (run.trace for run in runs)
plt.plot([t["loss"] for t in gcg], label="GCG, best so far")
plt.axhline(control["loss"], color="C1", linestyle="--", label="random suffix")
show(xlabel="step", ylabel="loss of the target")
table("step | loss | suffix", [[t["step"], t["loss"], t["sent"].removeprefix(prompt)] for t in gcg])

# %% [markdown]
# ## What the model answers
# Eight answers to the suffix of each step that the run tried, to the control and to no suffix. Of each eight
# the most harmful one is shown. A lower loss need not do more harm: it is of how the reasoning begins.
# %%
rows, sent = [], {f"GCG, step {i}": gcg[i]["sent"] for i in sorted({x["step"] for x in tries})}
for name, text in {**sent, "random suffix": control["sent"], "no suffix": prompt}.items():
    answers = victim.ask([(request, attacks.a_try(0, text))] * 8, range(8))
    worst = max(answers, key=lambda answer: answer["harm"])
    harmful = sum(not chapter4.defended(answer, settings.harm_threshold) for answer in answers)
    rows.append([name, harmful, worst["reasoning"], worst["answer"]])
table("sent | harmful of 8 | reasoning | answer", rows)

# %% [markdown]
# ## All requests of the run, and the plane
# One success at any budget breaks a request. *Plain or GCG* counts the plain request, too.
# %%
results, rows = json.loads((RUN / "eval/results.json").read_text())["models"], []
for name in results:
    held = chapter4.outcomes([line for line in lines if line["model"] == name])
    for attack in ("no_suffix", attacks.CONTROL, "gcg", "plain_or_gcg"):
        ci, kept = wilson(list(held[attack].values())), sum(held[attack].values())
        rows.append([name, attack, f"{kept} of {ci['n']}", f"[{ci['low']:.2f}, {ci['high']:.2f}]"])
table("model | attack | held | 95 % interval (Wilson)", rows)
show_report("plane", results)

# %% [markdown]
# **A question.** Where the loss fell and the answer stayed safe: what did the reasoning do with the suffix?
# How many requests would it take to tell two models apart whose intervals overlap here?
