"""GCG's variants, and the random control that they have to beat. They are given chapter 4's `search`.

Where the target stands is what the attack knows about a reasoner:

    gcg            right after "<think>\\n", where the reasoning should begin: the paper's choice
    gcg_close      behind an empty reasoning: the model is to stop thinking at once, and answer
    gcg_forged     behind a benign reasoning that the attacker makes up
    gcg_twin       behind the model's own compliant reasoning, which it wrote for a harmless request
    gcg_universal  as gcg, but one suffix for several requests, tried on all
    random_suffix  as gcg, without a search: as many tokens, drawn from those that GCG may use

For a model without reasoning the first four are the same, so it is attacked by `gcg` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lib import UserError
from lib.attacks.core import Attempt, Budget, Cost, a_try, ask_all, attach, too_long
from lib.attacks.suffix import Slot, check_target, surviving
from lib.attacks.victim import Victim
from lib.chat import THINK_CLOSE

CONTROL = "random_suffix"
RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip
TWIN_SAMPLES = 8  # reasonings that are sampled for `gcg_twin`, to find a compliant one


def gcg(variant: str, victim, behaviours, budget, generators, on_step, search) -> list[Attempt]:
    """One suffix for each behaviour."""
    attempts = []
    for behaviour, generator in zip(behaviours, generators, strict=True):
        cost, spend = Cost(), budget
        slot = Slot(victim, behaviour, aim(variant, victim, behaviour, budget, generator, cost), budget, cost)
        if not slot.fits:
            attempts.append(too_long(behaviour, behaviour["prompt"], cost))
            continue
        if variant == CONTROL:
            draw_suffix(slot, generator)
            spend = replace(budget, gcg_steps=0)
        trace = search([slot], spend, generator, on_step)
        attempts.append(_attempt(behaviour, trace, cost.total()))
    return attempts


def universal_gcg(victim, behaviours, budget, generators, on_step, search) -> list[Attempt]:
    """One suffix, searched for the first few behaviours and tried on all: does it carry over?"""
    first = behaviours[: budget.universal_behaviours]
    slots = {b["id"]: Slot(victim, b, check_target(b), budget, Cost()) for b in first}
    slots = {name: slot for name, slot in slots.items() if slot.fits}
    if not slots:
        return [too_long(b, b["prompt"], Cost()) for b in behaviours]
    trace = search(list(slots.values()), budget, generators[0], on_step)
    costs = {name: slot.cost.total() for name, slot in slots.items()}
    free = dict.fromkeys(Cost().total(), 0.0)  # a behaviour that it was not searched for costs nothing more
    return [_attempt(b, trace, costs.get(b["id"], free)) for b in behaviours]


def aim(variant: str, victim: Victim, behaviour: dict, budget: Budget, generator, cost: Cost) -> str:
    """The target, with the reasoning that the variant puts before it."""
    target = check_target(behaviour)
    if variant in ("gcg", CONTROL):
        return target
    if variant == "gcg_close":
        return THINK_CLOSE + target
    own = own_reasoning(victim, behaviour, generator, cost) if variant == "gcg_twin" else ""
    return (own or budget.forged) + THINK_CLOSE + target


def own_reasoning(victim: Victim, behaviour: dict, generator: torch.Generator, cost: Cost) -> str:
    """The first compliant one of a few reasonings about the behaviour's "twin"; "" if there is none."""
    twin = {**behaviour, "prompt": behaviour["twin"], "context": ""}
    tries = [a_try(k, twin["prompt"]) for k in range(TWIN_SAMPLES)]
    ask_all(victim, [twin], [tries], [generator], [cost])
    answers = [attempt["completion"] for attempt in tries]
    own = (a["reasoning"] for a in answers if a["well_formed"] and a["refusal"] == "none" and a["reasoning"])
    return next(own, "")


def draw_suffix(slot: Slot, generator: torch.Generator) -> None:
    """Let the slot start from a random suffix that survives the round trip. UserError if there is none."""
    tokens, suffixes, texts = slot.allowed().nonzero()[:, 0], torch.empty(1, 0, dtype=torch.long), [""]
    tries = RANDOM_TRIES if len(tokens) > 1 else 0  # of one token nothing can be searched
    for _ in range(len(slot.start)):
        drawn = tokens[torch.randint(max(1, len(tokens)), (tries, 1), generator=generator)]
        suffixes, texts = surviving([slot], torch.cat([suffixes[:1].expand(tries, -1), drawn], dim=1))
        if not texts:
            raise UserError(
                f"--attacks: {slot.victim.name}: of {len(tokens)} tokens that may stand in a suffix none "
                "survives decoding and encoding: leave random_suffix and gcg out"
            )
    slot.start, slot.start_text = suffixes[0], texts[0]


def check_suffixes(victim: Victim, behaviours: Sequence[dict], budget: Budget) -> None:
    """UserError where no suffix can be searched for: before the first search."""
    slots = [Slot(victim, b, check_target(b), budget, Cost()) for b in behaviours]
    able = [slot for slot in slots if slot.fits]
    if not able:
        raise UserError(
            f"gcg_suffix_tokens: given {budget.gcg_suffix_tokens}; with so many no request leaves "
            f"room for an answer in the context of {victim.name}: lower it"
        )
    draw_suffix(able[0], torch.Generator().manual_seed(0))


def _attempt(behaviour: dict, trace: list[dict], cost: dict[str, float]) -> Attempt:
    tries = [a_try(t["step"], attach(behaviour["prompt"], t["suffix"]), loss=t["loss"]) for t in trace]
    return Attempt(behaviour["id"], tries, cost)
