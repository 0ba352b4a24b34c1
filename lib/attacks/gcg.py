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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lib import UserError
from lib.attacks.core import Attempt, Budget, a_try, ask_all, attach
from lib.attacks.suffix import Slot, surviving
from lib.attacks.victim import Victim
from lib.chat import THINK_CLOSE

RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip
TWIN_SAMPLES = 8  # reasonings that are sampled for `gcg_twin`, to find a compliant one


def gcg(variant: str, victim, attempts, budget, search) -> None:
    """One suffix for each behaviour."""
    for attempt in attempts:
        slot = Slot(victim, attempt, aim(variant, victim, attempt, budget), budget)
        search_and_attach([slot], [attempt], budget, search)


def universal_gcg(victim, attempts, budget, search) -> None:
    """One suffix, searched for the first few behaviours and tried on all: does it carry over?"""
    first = attempts[: budget.universal_behaviours]
    slots = [Slot(victim, attempt, attempt.behaviour["target"], budget) for attempt in first]
    search_and_attach(slots, attempts, budget, search)


def random_suffix(victim, attempts, budget, search) -> None:
    """The search is to make no step, and so reports the loss at its start."""
    for attempt in attempts:
        slot = Slot(victim, attempt, attempt.behaviour["target"], budget)
        draw_suffix(slot, attempt.generator)
        search_and_attach([slot], [attempt], replace(budget, gcg_steps=0), search)


def search_and_attach(slots: list[Slot], attempts: list[Attempt], budget: Budget, search: Callable) -> None:
    """Search in the slots that fit, and put what is found behind all prompts. Where none fits, what is sent
    is too long to be asked."""
    slots = [slot for slot in slots if slot.fits]
    start: dict[str, Any] = {"step": 0, "suffix": budget.initial_suffix(), "loss": None}
    found = search(slots, budget, attempts[0].generator) if slots else [start]
    for attempt in attempts:
        for best in found:
            sent = attach(attempt.prompt, best["suffix"])
            attempt.trace.append(a_try(best["step"], sent, loss=best["loss"]))


def aim(variant: str, victim: Victim, attempt: Attempt, budget: Budget) -> str:
    """The target, with the reasoning that the variant puts before it."""
    target = attempt.behaviour["target"]
    if variant == "gcg":
        return target
    if variant == "gcg_close":
        return THINK_CLOSE + target
    own = own_reasoning(victim, attempt) if variant == "gcg_twin" else ""
    return (own or budget.forged) + THINK_CLOSE + target


def own_reasoning(victim: Victim, attempt: Attempt) -> str:
    """The first compliant one of a few reasonings about the behaviour's "twin"; "" if there is none."""
    behaviour = {**attempt.behaviour, "prompt": attempt.behaviour["twin"], "context": ""}
    twin = replace(attempt, behaviour=behaviour, trace=[])  # at the cost of the attempt
    ask_all(victim, [(twin, a_try(k, twin.prompt)) for k in range(TWIN_SAMPLES)])
    answers = [asked["completion"] for asked in twin.trace]
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
    slots = [Slot(victim, Attempt(b), b["target"], budget) for b in behaviours]
    able = [slot for slot in slots if slot.fits]
    if not able:
        raise UserError(
            f"gcg_suffix_tokens: given {budget.gcg_suffix_tokens}; with so many no request leaves "
            f"room for an answer in the context of {victim.name}: lower it"
        )
    draw_suffix(able[0], torch.Generator().manual_seed(0))
