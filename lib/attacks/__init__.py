"""The room of attacks: what chapter 4 sends against a model, beside GCG, which stands in the chapter.

An attack is a function (victim, attempts, budget, helper): of each attempt, one a behaviour, it fills the
trace of what it tried, and counts what that cost. `helper` is chapter 4's search, or the attacker, who writes
its words. An attempt has its own random numbers: nothing depends on its neighbours. Who attacks must have:

    white-box   weights: gradients         gcg.py: variants, and a suffix as text and as tokens
    score       likelihoods of its choice  autodan.py
    prefill     may open the model's turn  asking.py
    black-box   answers                    asking.py; who writes the words: attacker.py
                or nothing at all          gcg.py: random_suffix, a control

table.py lists them; core.py has what they share, such as the model under attack; session.py the rest: checks,
processes, files. rainbow.py searches for prompts to train on (chapter 1). Skip the room at first; the chapter
says what an attack is. Tests: test_attacks.py, test_rainbow.py; of whole evaluations, test_eval.py.
"""

from __future__ import annotations

from lib.attacks.core import NOT_ASKED, Attempt, Budget, Victim, a_try, only_asked
from lib.attacks.gcg import Slot, first_exact, surviving
from lib.attacks.rainbow import search
from lib.attacks.session import Lab, Model, Tries, files_of, read_models, read_sets, summary
from lib.attacks.table import ATTACKS, CONTROL, chosen

__all__ = ["ATTACKS", "CONTROL", "NOT_ASKED", "Attempt", "Budget", "Lab", "Model", "Slot", "Tries", "Victim"]
__all__ += ["a_try", "chosen", "files_of", "first_exact", "only_asked", "read_models", "read_sets"]
__all__ += ["search", "summary", "surviving"]
