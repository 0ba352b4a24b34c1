"""The sandbox: a made-up world in which the paper's effect shows on a laptop in minutes. Skip it at first.

Nothing of the method is in here. What the paper takes from data sets, guard models and graders, this room
makes up, and the chapters reach it as they reach those, by a name: `--source`, `--judge` and `--attacker
sandbox`.

    world.py       requests, disguises and twins; the splits that keep training and evaluation apart
    traces.py      what a teacher would have written: reasoning and answer, diverse and imperfect
    judge.py       harm and task scores, exact, from the prompt's text alone
    attacker.py    who writes the words of PAP, PAIR and AutoDAN
    rainbow.py     the cells of rainbow teaming
    preference.py  one reward for all prompts: `--judge sandbox-preference`, finding F7
    base/          pi_base, 0.8 M parameters, which pretrain.py makes, with a card

Tests: tests/test_world.py, and of rainbow.py tests/test_rainbow.py.
"""
