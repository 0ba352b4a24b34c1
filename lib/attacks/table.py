"""All attacks, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import lib.attacks.asking as asking
import lib.attacks.gcg as gcg
from lib.attacks.autodan import autodan

CONTROL = "random_suffix"


@dataclass(frozen=True)
class Attack:
    """`asks`: it sends its tries itself. Else it searches without asking, and the best that it has found is
    sent once at each of a few budgets. Either way these are its tries, and one success is enough."""

    run: Callable[..., None]
    access: str
    helper: str = ""  # whom it is given: chapter 4's "search", or the "attacker", who writes its words
    asks: bool = False
    reasoners_only: bool = False
    target: bool = True  # a behaviour without one is passed over
    at_once: int = 1  # behaviours that it handles together; a kill costs at most so many (0: all)


_prefill = partial(Attack, access="prefill", asks=True, at_once=32)
_gcg = partial(Attack, access="white-box", helper="search")
_by_words = partial(Attack, access="black-box", helper="attacker", asks=True, target=False, at_once=8)
ATTACKS: dict[str, Attack] = {
    CONTROL: Attack(partial(gcg.gcg, CONTROL), "black-box", helper="search"),
    "gcg": _gcg(partial(gcg.gcg, "gcg")),
    "gcg_close": _gcg(partial(gcg.gcg, "gcg_close"), reasoners_only=True),
    "gcg_forged": _gcg(partial(gcg.gcg, "gcg_forged"), reasoners_only=True),
    "gcg_twin": _gcg(partial(gcg.gcg, "gcg_twin"), reasoners_only=True),
    "gcg_universal": _gcg(partial(gcg.gcg, "gcg_universal"), at_once=0),
    "autodan": Attack(autodan, "score", helper="attacker"),
    "prefill_reasoning": _prefill(asking.prefill_reasoning, reasoners_only=True, target=False),
    "prefill_answer": _prefill(asking.prefill_answer),
    "best_of_n": _by_words(asking.best_of_n),
    "pap": _by_words(asking.pap),
    "pair": _by_words(asking.pair),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The attacks of --attacks. A search for a suffix brings its control along."""
    names = list(ATTACKS) if "all" in names else list(names)
    control = [CONTROL] if any(ATTACKS[name].access == "white-box" for name in names) else []
    return list(dict.fromkeys(control + names))
