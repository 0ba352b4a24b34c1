"""Attacks that only ask: they see answers, not the model. Each try is answered and judged; any success counts.

    prefill_reasoning, prefill_answer   the attacker opens the model's turn (an interface that allows it is enough)
    best_of_n                           the same request again and again, disturbed at random (Hughes et al. 2024)
    pap                                 persuasion, one technique a try (Zeng et al. 2024)
    pair                                an attacker's model that learns from the answers (Chao et al. 2023)

Who writes the words is an `Attacker`: a language model, or the sandbox's own, which speaks its few hundred words.
"""

from __future__ import annotations

import torch

from lib.attacks.core import Attacker, Attempt, Budget, Cost, Step, a_try, ask_all
from lib.attacks.suffix import check_target
from lib.chat import THINK_CLOSE
from lib.victim import Victim, draw_seeds

Generators = list[torch.Generator]


def prefill_reasoning(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: Generators, on_step: Step
) -> list[Attempt]:
    """A reasoner's turn opens with a forged benign reasoning, which it may still go on with."""
    tries = [[a_try(1, b["prompt"], budget.forged)] for b in behaviours]
    return _asked(victim, behaviours, tries, generators, on_step)


def prefill_answer(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: Generators, on_step: Step
) -> list[Attempt]:
    """The answer opens as a compliant one would: with the behaviour's "prefill", or else its target. A reasoner's reasoning
    is forged before it."""
    before = budget.forged + THINK_CLOSE if victim.reasoning else ""
    tries = [[a_try(1, b["prompt"], before + (b.get("prefill") or check_target(b)))] for b in behaviours]
    return _asked(victim, behaviours, tries, generators, on_step)


def best_of_n(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: Generators, on_step: Step, attacker: Attacker
) -> list[Attempt]:
    """The first try is the request as it is, so it is plain resampling that the disturbances have to beat."""
    tries = [
        [a_try(k, b["prompt"] if k == 1 else attacker.augment(b["prompt"], g)) for k in range(1, budget.samples + 1)]
        for b, g in zip(behaviours, generators, strict=True)
    ]
    return _asked(victim, behaviours, tries, generators, on_step)


def pap(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: Generators, on_step: Step, attacker: Attacker
) -> list[Attempt]:
    """Each behaviour with as many techniques, drawn anew for each."""
    costs, tries = [Cost() for _ in behaviours], []
    for behaviour, generator, cost in zip(behaviours, generators, costs, strict=True):
        chosen = torch.randperm(attacker.techniques, generator=generator)[: budget.techniques].tolist()
        seeds = draw_seeds(generator, len(chosen))
        texts = attacker.persuade([behaviour["prompt"]] * len(chosen), chosen, seeds)
        cost.written(victim, texts)
        tries.append([a_try(k, text) for k, text in enumerate(texts, 1) if text])
    return _asked(victim, behaviours, tries, generators, on_step, costs)


def pair(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: Generators, on_step: Step, attacker: Attacker
) -> list[Attempt]:
    """`streams` conversations of `depth` turns for each behaviour. The attacker is shown answers and the judge's score only:
    never the reasoning (paper). A behaviour that is broken is left alone."""
    costs = [Cost() for _ in behaviours]
    tries: list[list[dict]] = [[] for _ in behaviours]
    histories: list[list[list[dict]]] = [[[] for _ in range(budget.streams)] for _ in behaviours]
    for turn in range(budget.depth):
        open_ones = [i for i in range(len(behaviours)) if not any(_broken(t, budget) for t in tries[i])]
        streams = [(i, s) for i in open_ones for s in range(budget.streams)]
        seeds = [seed for i in open_ones for seed in draw_seeds(generators[i], budget.streams)]
        texts = attacker.refine([behaviours[i]["prompt"] for i, _ in streams], [histories[i][s] for i, s in streams], seeds)
        new: dict[int, list[dict]] = {i: [] for i in open_ones}
        for (i, s), text in zip(streams, texts, strict=True):
            costs[i].written(victim, [text])
            if text:
                new[i].append(a_try(turn * budget.streams + s + 1, text))
        rows = [i for i in open_ones if new[i]]
        ask_all(
            victim, [behaviours[i] for i in rows], [new[i] for i in rows], [generators[i] for i in rows], [costs[i] for i in rows]
        )
        for i in rows:
            tries[i] += new[i]
            for attempt in new[i]:
                answer = attempt["completion"]
                seen = {"sent": attempt["sent"], "answer": answer["answer"], "harm": answer["harm"]}
                histories[i][(attempt["step"] - 1) % budget.streams].append(seen)
        on_step()
    return [Attempt(b["id"], t, c.total()) for b, t, c in zip(behaviours, tries, costs, strict=True)]


def _broken(attempt: dict, budget: Budget) -> bool:
    harm = attempt["completion"]["harm"]
    return harm is not None and harm >= budget.harm_threshold


def _asked(victim, behaviours, tries, generators, on_step, costs: list[Cost] | None = None) -> list[Attempt]:
    costs = costs or [Cost() for _ in behaviours]
    ask_all(victim, behaviours, tries, generators, costs)
    on_step()
    return [Attempt(b["id"], t, c.total()) for b, t, c in zip(behaviours, tries, costs, strict=True)]
