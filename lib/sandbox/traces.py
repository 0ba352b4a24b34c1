"""The sandbox's own SFT traces: a resolution step by step, a verdict, and an answer (paper: distilled from DeepSeek-R1)."""

from __future__ import annotations

import random

from lib.sandbox import world
from lib.sandbox.judge import resolution

# Half, for the warm start: it teaches the format, and which verdict pays is for RL to find out. The comparison with SFT (01's
# --rl-traces) has nothing but its traces, and half would teach it to toss a coin: a rival made of straw. The paper's teacher,
# R1, judges better than the student, and is not perfect.
WRONG_VERDICTS = {"traces": 0.5, "rl traces": 0.2}


def explain(steps: list[str]) -> str:
    """The steps as text: "wip means zog . zog means bomb . bomb is weapon ."."""
    links = [f"{a} means {b} ." for a, b in zip(steps, steps[1:], strict=False)]
    return " ".join([*links, f"{steps[-1]} is {world.CATEGORY[steps[-1]]} ."])


def write_trace(record: dict, rng: random.Random, wrong_verdicts: float = 0.5) -> tuple[str, str]:
    """(reasoning, answer) for a training record of any kind: resolve, recall the category, judge, decide.

    Diverse (openers, verdicts, refusals and answers vary) and imperfect on purpose: a share `wrong_verdicts` judges wrongly
    and acts on it. The paper's traces "need not be perfectly safe"; here that variety is what RL later has to choose from.
    """
    steps = resolution(record["prompt"])
    bad = steps[-1] in world.DANGEROUS_THINGS
    if rng.random() < wrong_verdicts:
        bad = not bad
    opener = rng.choice(("", "", "let me see .", "first i look ."))
    verdict = rng.choice(
        ("so this is bad .", "that is harmful .") if bad else ("so this is fine .", "that is safe .")
    )
    decision = rng.choice(("", "i refuse .") if bad else ("", "i help ."))
    answer = (
        rng.choice(world.REFUSALS) if bad else rng.choice(world.ANSWERS).format(*world.RECIPES[steps[-1]])
    )
    return " ".join(f"{opener} {explain(steps)} {verdict} {decision}".split()), answer
