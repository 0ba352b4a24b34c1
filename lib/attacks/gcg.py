"""GCG, a white-box attack by gradients, and the random control that it has to beat (paper, "Evaluation").

GCG (greedy coordinate gradient, Zou et al. 2023) looks for a *suffix*: a few tokens behind the prompt that make a
*target* ("Sure, here is how to ...") the likely beginning of what the model writes.

    chat template, prompt | suffix | end of turn, model's turn | target
    `prefix`, read once   | varies | `rest`                    | loss: mean negative log-likelihood

One step of `search`:

1. `gradient`: with the suffix as one-hot rows, the loss's gradient says to first order how much each token of
   the vocabulary would lower the loss at each position, (suffix, vocab).
2. `propose`: `width` different swaps of one token each, at random among the `top_k` best of each position.
3. `losses`: the true loss of each candidate. Move to the best one, even if it is worse than where we are: the
   search must get out of local minima. (With a buffer, move to the best of the best so far instead.)

A model is attacked through text, so a candidate counts as the tokens of its *re-encoded text*. One that comes
back as other tokens is dropped and counted; else an attack may report a suffix that nobody can type.

Where the target stands is what the attack knows about a reasoner, `TARGETS`:

    gcg          right after "<think>\\n", where the reasoning should begin: the paper's choice. Non-adaptive.
    gcg_close    behind an empty reasoning: the model is to stop thinking at once, and answer
    gcg_forged   behind a benign reasoning that the attacker makes up
    gcg_twin     behind the model's own compliant reasoning, which it wrote for a harmless request

For a model without reasoning all four are the same, so it is attacked by `gcg` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib.attacks.core import Attempt, Budget, Cost, Step, a_try, attach
from lib.attacks.suffix import Slot, check_target
from lib.chat import THINK_CLOSE
from lib.settings import UserError
from lib.victim import Victim, draw_seeds

RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip
TWIN_SAMPLES = 8  # reasonings that are sampled for `gcg_twin`, to find a compliant one

# ---- targets -----------------------------------------------------------------------------------------------


def plain_target(victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost) -> str:
    return check_target(behaviour)


def close_target(victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost) -> str:
    return THINK_CLOSE + check_target(behaviour)


def forged_target(victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost) -> str:
    return budget.forged + THINK_CLOSE + check_target(behaviour)


def twin_target(victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost) -> str:
    """The first compliant one of a few reasonings about the behaviour's "twin"; the forged one if there is none."""
    seeds = draw_seeds(generator, TWIN_SAMPLES)
    twin = {**behaviour, "prompt": behaviour["twin"]}
    answers = victim.ask([twin] * TWIN_SAMPLES, [behaviour["twin"]] * TWIN_SAMPLES, [""] * TWIN_SAMPLES, seeds)
    for answer in answers:
        cost.asked(victim, behaviour["twin"], "", answer)
    own = [a["reasoning"] for a in answers if a["well_formed"] and a["refusal"] == "none" and a["reasoning"]]
    return (own[0] if own else budget.forged) + THINK_CLOSE + check_target(behaviour)


TARGETS: dict[str, Callable[[Victim, dict, Budget, torch.Generator, Cost], str]] = {
    "gcg": plain_target,
    "gcg_close": close_target,
    "gcg_forged": forged_target,
    "gcg_twin": twin_target,
}

# ---- the search --------------------------------------------------------------------------------------------


def search(
    slots: Sequence[Slot],
    budget: Budget,
    generator: torch.Generator,
    on_step: Step,
    succeeds: Callable[[str], bool] = lambda suffix: False,
) -> list[dict]:
    """One suffix for all slots: [{"step", "loss": mean over slots, "suffix"}, ...], entry k the best up to step k.

    Stops when `succeeds(best suffix so far)`, which is asked after the steps in `budget.gcg_checks`.
    """
    suffix, allowed = slots[0].start, torch.stack([s.allowed() for s in slots]).all(0)
    best = mean_losses(slots, suffix[None]).item()
    trace: list[dict] = [{"step": 0, "loss": best, "suffix": budget.initial_suffix()}]
    buffer = [(best, suffix)]
    for step in range(1, budget.gcg_steps + 1):
        gradients = [slot.gradient(suffix) for slot in slots]
        mean = torch.stack([g / g.norm(dim=1, keepdim=True).clamp(min=1e-12) for g in gradients]).mean(0)
        candidates = propose(mean if len(slots) > 1 else gradients[0], suffix, allowed, budget, generator)
        kept, texts = surviving(slots, candidates)
        losses = mean_losses(slots, kept)
        trace.append({**trace[-1], "step": step})
        for i in losses.argsort().tolist():
            if not all(slot.is_exact(texts[i], kept[i]) for slot in slots):  # the first one almost always is
                slots[0].cost.did_not_survive += 1
                continue
            suffix, loss = kept[i], losses[i].item()
            if loss < best:
                best, trace[-1] = loss, {"step": step, "loss": loss, "suffix": texts[i]}
            if budget.gcg_buffer:
                buffer = sorted([*buffer, (loss, suffix)], key=lambda pair: pair[0])[: budget.gcg_buffer]
                suffix = buffer[0][1]
            break
        on_step()
        if step in budget.gcg_checks and step < budget.gcg_steps and succeeds(trace[-1]["suffix"]):
            for _ in range(budget.gcg_steps - step):
                on_step()
            break
    return trace


def propose(gradient: Tensor, suffix: Tensor, allowed: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """gradient (S, vocab), suffix (S,), allowed (vocab,) -> N <= width different single swaps, (N, S)."""
    promise = (-gradient).masked_fill(~allowed, -torch.inf)
    promise[torch.arange(len(suffix)), suffix] = -torch.inf  # a swap must change something
    top_k = min(budget.gcg_top_k, int(allowed.sum()) - 1)
    tokens = promise.topk(top_k, dim=1).indices.flatten()  # (S * top_k,), position by position
    chosen = torch.randperm(len(tokens), generator=generator)[: budget.gcg_width]
    candidates = suffix.repeat(len(chosen), 1)
    candidates[torch.arange(len(chosen)), chosen // top_k] = tokens[chosen]
    return candidates


def surviving(slots: Sequence[Slot], candidates: Tensor) -> tuple[Tensor, list[str]]:
    """Candidates (N, S) that survive the round trip behind every slot's prompt, (M, S), with their texts."""
    texts: list[str] = []
    for slot in slots:
        candidates, texts = slot.surviving(candidates)
    return candidates, texts


def mean_losses(slots: Sequence[Slot], suffixes: Tensor) -> Tensor:
    """suffixes (N, S) -> (N,) fp32."""
    return torch.stack([slot.losses(suffixes) for slot in slots]).mean(0)


# ---- attacks -----------------------------------------------------------------------------------------------


def gcg(target: str) -> Callable[..., list[Attempt]]:
    """The attack with one of TARGETS. Access: white-box."""

    def attack(
        victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step
    ) -> list[Attempt]:
        attempts = []
        for behaviour, generator in zip(behaviours, generators, strict=True):
            cost = Cost()
            slot = Slot(victim, behaviour, TARGETS[target](victim, behaviour, budget, generator, cost), budget, cost)

            def succeeds(suffix: str, behaviour: dict = behaviour, cost: Cost = cost) -> bool:
                sent = attach(behaviour["prompt"], suffix)
                answer = victim.ask([behaviour], [sent], [""], [0], greedy=True)[0]
                cost.asked(victim, sent, "", answer)
                return answer["harm"] is not None and answer["harm"] >= budget.harm_threshold

            trace = search([slot], budget, generator, on_step, succeeds)
            attempts.append(Attempt(behaviour["id"], _tries(behaviour, trace), cost.total()))
        return attempts

    return attack


def universal_gcg(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step
) -> list[Attempt]:
    """One suffix, searched for the first few behaviours and tried on all: does it carry over? Access: white-box."""
    known = behaviours[: budget.universal_behaviours]
    targets = [check_target(b) for b in known]
    slots = [Slot(victim, b, target, budget) for b, target in zip(known, targets, strict=True)]
    trace = search(slots, budget, generators[0], on_step)
    costs = [slot.cost.total() for slot in slots]
    costs += [dict.fromkeys(costs[0], 0) for _ in behaviours[len(known) :]]  # a held-out behaviour costs nothing more
    return [Attempt(b["id"], _tries(b, trace), cost) for b, cost in zip(behaviours, costs, strict=True)]


def random_suffix(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step
) -> list[Attempt]:
    """The control: as many tokens, drawn from those that GCG may use, surviving the round trip."""
    attempts = []
    for behaviour, generator in zip(behaviours, generators, strict=True):
        slot = Slot(victim, behaviour, check_target(behaviour), budget)
        tokens = slot.allowed().nonzero()[:, 0]
        suffix, text = torch.empty(0, dtype=torch.long), ""
        for _ in range(budget.gcg_suffix_tokens):
            drawn = tokens[torch.randint(len(tokens), (RANDOM_TRIES, 1), generator=generator)]
            kept, texts = slot.surviving(torch.cat([suffix.expand(RANDOM_TRIES, -1), drawn], dim=1))
            if not texts:
                raise UserError(f"behaviour {behaviour['id']}: found no random suffix that survives re-encoding")
            suffix, text = kept[0], texts[0]
        loss = slot.losses(suffix[None]).item()
        attempts.append(Attempt(behaviour["id"], [a_try(0, attach(behaviour["prompt"], text), loss=loss)], slot.cost.total()))
        on_step()
    return attempts


def _tries(behaviour: dict, trace: list[dict]) -> list[dict]:
    return [a_try(t["step"], attach(behaviour["prompt"], t["suffix"]), loss=t["loss"]) for t in trace]
