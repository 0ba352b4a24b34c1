"""The sandbox's own SFT traces, in the place of DeepSeek-R1's: resolution step by step, verdict, answer."""

from __future__ import annotations

import random

from lib.sandbox import world
from lib.sandbox.judge import VERDICTS, resolution

# Half, for the warm start: it teaches the format, and which verdict pays is for RL to find out. The
# comparison with SFT (01's --rl-traces) has nothing but its traces, and half would teach it to toss a coin:
# a rival made of straw. The paper's teacher, R1, judges better than the student, and is not perfect.
WRONG_VERDICTS = {"traces": 0.5, "rl traces": 0.2}


def explain(steps: list[str]) -> str:
    """A resolution as text.

    >>> explain(["wip", "zog", "bomb"])
    'wip means zog . zog means bomb . bomb is weapon .'
    """
    links = [f"{a} means {b} ." for a, b in zip(steps, steps[1:], strict=False)]
    return " ".join([*links, f"{steps[-1]} is {world.CATEGORY[steps[-1]]} ."])


def write_trace(record: dict, rng: random.Random, wrong_verdicts: float = 0.5) -> tuple[str, str]:
    """(reasoning, answer) for a training record of any kind: resolve, recall the category, judge, decide.

    Diverse, and imperfect on purpose: a share `wrong_verdicts` judges wrongly and acts on it. The paper's
    traces "need not be perfectly safe"; that variety is what RL later has to choose from.
    """
    steps = resolution(record["prompt"])
    bad = (steps[-1] in world.DANGEROUS_THINGS) != (rng.random() < wrong_verdicts)
    opener = rng.choice(("", "", "let me see .", "first i look ."))
    verdict = rng.choice(VERDICTS["bad" if bad else "fine"])
    decision = rng.choice(("", "i refuse .") if bad else ("", "i help ."))
    if bad:
        answer = rng.choice(world.REFUSALS)
    else:
        answer = rng.choice(world.ANSWERS).format(*world.RECIPES[steps[-1]])
    return " ".join(f"{opener} {explain(steps)} {verdict} {decision}".split()), answer
