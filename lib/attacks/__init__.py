"""The room of attacks: what chapter 4 sends against a model beside GCG, which stands in the chapter.

An attack is a function (victim, behaviours, budget, generators, on_step[, search or attacker]) -> [Attempt], one for
each behaviour, with a trace of what it tried and what that cost. A behaviour is a record with id, prompt and target; it
has a random generator of its own, so what is done to it does not depend on its neighbours. What an attacker must have:

    white-box   weights: gradients         gcg.py, over suffix.py (text and tokens of a suffix)
    score       likelihoods of its choice  autodan.py
    prefill     may open the model's turn  asking.py
    black-box   answers                    asking.py; who writes the words: attacker.py, persuasion.py
                or nothing at all          gcg.py: random_suffix, a control

core.py has what they share, victim.py the model that is asked, session.py the files, checks and processes around it all.
rainbow.py searches for prompts to train on (chapter 1). Skip the room at first: the chapter says what an attack is.
Tested in tests/test_attacks.py, test_asking.py and test_rainbow.py.
"""

from lib.attacks.core import Attempt, Budget, a_try
from lib.attacks.session import Lab, Model, Tries, attack_summary, files_of, read_models, read_sets
from lib.attacks.suffix import Slot, first_exact, surviving
from lib.attacks.table import ATTACKS, CONTROL, chosen, steps_of
from lib.attacks.victim import NOT_ASKED, Victim

__all__ = [
    "ATTACKS",
    "CONTROL",
    "NOT_ASKED",
    "Attempt",
    "Budget",
    "Lab",
    "Model",
    "Slot",
    "Tries",
    "Victim",
    "a_try",
]
__all__ += [
    "attack_summary",
    "chosen",
    "files_of",
    "first_exact",
    "read_models",
    "read_sets",
    "steps_of",
    "surviving",
]
