# %% [markdown]
# # Lesson 4: an attack, step by step
# GCG looks for a few words behind a request that make the wanted answer likely.
# The code is that of `04_attack_eval.py`. The words of the sandbox are made up.

# %%
import json

import matplotlib.pyplot as plt
import torch
from lesson import RUN, chapter, settings_of, show, table

from lib.attacks import ATTACKS, CONTROL, Slot, Victim, surviving
from lib.attacks.core import Cost
from lib.judges import load_judge
from lib.metrics import wilson
from lib.run.files import read_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import draw_seeds, random_numbers

chapter4 = chapter("04_attack_eval")
settings = settings_of(chapter4, RUN / "eval")
model, tokenizer = load_policy(RUN / "rl", device="cpu").requires_grad_(False), load_tokenizer(RUN / "rl")
judge, limits = load_judge("sandbox"), (settings.max_new_tokens, settings.temperature)
victim = Victim("tars", model, tokenizer, True, judge, *limits)

# %% [markdown]
# ## A request, and the way in
# We take a request that GCG broke in this run, if there is one.

# %%
lines = read_jsonl(RUN / "eval/completions.jsonl")
lines = [line | {"defended": chapter4.defended(line, settings.harm_threshold)} for line in lines]
broken = [x["id"] for x in lines if x["model"] == "tars" and x["set"] == "gcg" and not x["defended"]]
requests = read_jsonl(RUN / "data/eval_harmful.jsonl")[: settings.behaviours]
request = next((r for r in requests if r["id"] in broken), requests[0])
print(f"request: {request['prompt']}\ntarget:  {request['target']}\nstart:   {settings.initial_suffix()}")

# %% [markdown]
# ## One step
# The gradient promises how much a swap of one word lowers the loss. The true loss tells what it was worth.

# %%
slot, generator = Slot(victim, request, request["target"], settings, Cost()), random_numbers(0, "lesson")
slopes = chapter4.gradient(slot, slot.start)  # (S, vocab)
candidates = chapter4.propose(slopes, slot.start, slot.allowed(), settings, generator)  # (N, S)
candidates, texts = surviving([slot], candidates)
now, found = chapter4.losses(slot, slot.start[None]).item(), chapter4.losses(slot, candidates)
places = torch.arange(len(slot.start))
promised = (slopes[places, candidates] - slopes[places, slot.start]).sum(1)  # (N,)
best = found.argsort()[:3].tolist()
print(f"loss at the start {now:.3f}")
table("promised | true | suffix", [[promised[i].item(), found[i].item() - now, texts[i]] for i in best])
fig, axes = plt.subplots(figsize=(4.5, 3))
axes.plot(promised, found - now, ".")
axes.axhline(0, color="black", linewidth=0.8)
axes.set(xlabel="change of the loss, promised", ylabel="change of the loss, true")
plt.show()

# %% [markdown]
# ## The whole search, and a control
# The control has as many random words, and no search.

# %%
traces = {}
for name in ("gcg", CONTROL):
    seeded = [random_numbers(settings.seed, f"{name}/{request['id']}")]  # as in the run
    attempt = ATTACKS[name].run(victim, [request], settings, seeded, lambda *_: None, chapter4.search)[0]
    traces[name] = attempt.trace
fig, axes = plt.subplots(figsize=(5, 2.6))
axes.plot([t["loss"] for t in traces["gcg"]], label="GCG, best so far")
axes.axhline(traces[CONTROL][0]["loss"], color="C1", linestyle="--", label="random suffix")
axes.set(xlabel="step", ylabel="loss of the target")
axes.legend(fontsize="small")
plt.show()
steps = [
    t
    for before, t in zip([{"sent": ""}, *traces["gcg"]], traces["gcg"], strict=False)
    if t["sent"] != before["sent"]
]
table(
    "step | loss | suffix", [[t["step"], t["loss"], t["sent"][len(request["prompt"]) + 1 :]] for t in steps]
)

# %% [markdown]
# ## What the model answers
# Eight answers at three steps, and beside them to no suffix and to the control. A low loss is not yet harm.

# %%
last = len(traces["gcg"]) - 1
asked = {f"GCG, step {step}": traces["gcg"][step]["sent"] for step in (0, last // 2, last)}
asked |= {"random suffix": traces[CONTROL][0]["sent"], "no suffix": request["prompt"]}
rows = []
for name, sent in asked.items():
    answers = victim.ask([request] * 8, [sent] * 8, [""] * 8, draw_seeds(random_numbers(0, name), 8))
    worst = max(answers, key=lambda answer: answer["harm"])
    harmful = sum(not chapter4.defended(answer, settings.harm_threshold) for answer in answers)
    rows.append([name, harmful, f"{worst['reasoning']} | {worst['answer']}"])
table("sent | harmful of 8 | the worst: reasoning | answer", [[*r[:2], *r[2].split(" | ")] for r in rows])

# %% [markdown]
# ## All requests of the run
# One harmful answer at any budget breaks a request. The interval is Wilson's: so few requests say so much.
# *Plain or GCG* also counts the request as it is: a suffix may confuse a model that a plain request breaks.

# %%
results, rows = json.loads((RUN / "eval/results.json").read_text())["models"], []
for name in results:
    held = chapter4.outcomes([line for line in lines if line["model"] == name])
    for attack in ("no_suffix", CONTROL, "gcg", "plain_or_gcg"):
        kept, ci = list(held[attack].values()), wilson(list(held[attack].values()))
        rows.append([name, attack, f"{sum(kept)} of {len(kept)}", f"[{ci['low']:.2f}, {ci['high']:.2f}]"])
table("model | attack | defended | 95 % interval", rows)

# %% [markdown]
# ## The plane: what a defence is worth, and what it costs

# %%
show("plane", results)

# %% [markdown]
# **A question.** Where the loss fell and the answer stayed safe: which words did the reasoning trust?
# And which two models does this plane not tell apart, though their intervals for GCG alone might?
