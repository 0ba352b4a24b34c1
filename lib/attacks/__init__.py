"""The attacks of chapter 4, one short file each, behind one interface.

An attack is a function (victim, behaviours, budget, generators, on_step[, attacker]) -> [Attempt], one for each behaviour, with
a trace of what it tried and what that cost. A behaviour is a record with id, prompt and target; it has a random generator of
its own, so what is done to it does not depend on its neighbours. `access` is what the attacker has to have:

    white-box   weights: gradients         (gcg and its variants)
    score       likelihoods of its choice  (autodan)
    prefill     may open the model's turn  (prefill_*)
    black-box   answers                    (best_of_n, pap, pair), or nothing at all (random_suffix)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lib.attacks import asking, autodan, gcg
from lib.attacks.core import Attempt, Budget

__all__ = ["ATTACKS", "CONTROL", "Attack", "Attempt", "Budget", "steps_of"]

CONTROL = "random_suffix"  # every white-box attack has to beat it


@dataclass(frozen=True)
class Attack:
    """`asks`: it sends its tries itself. Else it searches without asking, and the best that it has found so far is
    sent once at each of a few budgets. Either way these are its tries, and one success among them is enough."""

    run: Callable[..., list[Attempt]]
    access: str
    asks: bool = False
    attacker: bool = False  # somebody has to write its words
    reasoners_only: bool = False
    target: bool = True  # a behaviour without one is passed over
    at_once: int = 1  # behaviours that it handles together; a kill costs at most so many (0: all)


ATTACKS: dict[str, Attack] = {
    CONTROL: Attack(gcg.random_suffix, "black-box"),
    "gcg": Attack(gcg.gcg("gcg"), "white-box"),
    "gcg_close": Attack(gcg.gcg("gcg_close"), "white-box", reasoners_only=True),
    "gcg_forged": Attack(gcg.gcg("gcg_forged"), "white-box", reasoners_only=True),
    "gcg_twin": Attack(gcg.gcg("gcg_twin"), "white-box", reasoners_only=True),
    "gcg_universal": Attack(gcg.universal_gcg, "white-box", at_once=0),
    "autodan": Attack(autodan.autodan, "score", attacker=True),
    "prefill_reasoning": Attack(
        asking.prefill_reasoning, "prefill", asks=True, reasoners_only=True, at_once=32, target=False
    ),
    "prefill_answer": Attack(asking.prefill_answer, "prefill", asks=True, at_once=32),
    "best_of_n": Attack(asking.best_of_n, "black-box", asks=True, attacker=True, at_once=8, target=False),
    "pap": Attack(asking.pap, "black-box", asks=True, attacker=True, at_once=8, target=False),
    "pair": Attack(asking.pair, "black-box", asks=True, attacker=True, at_once=8, target=False),
}


def steps_of(attack: str, budget: Budget) -> int:
    """The steps that an attack makes for one behaviour: what its budget curve runs to."""
    if attack.startswith("gcg"):
        return budget.gcg_steps
    tries = {"autodan": budget.generations, "best_of_n": budget.samples, "pap": budget.techniques}
    return {**tries, "pair": budget.streams * budget.depth, CONTROL: 0}.get(attack, 1)
