"""Judges: who scores the harm of an answer, and how far it does what was asked (`lib.rewards.Judge`).

    load_judge(name, refusals)   the judge by its name, say "sandbox", "qwen3guard+grm-8b" or "your.module"
    refusal_label(answer)        "full", "partial" or "none", by phrases

Skip this room at first: the sandbox has an exact judge of its own, and chapters call nothing else. Inside are

    guards      qwen3guard, llama-guard; harmbench, the paper's judge of attacks; reward models: grm, skywork
    graders     strongreject and rubric: a chat model is asked       moderation  OpenAI's API
    refusals    phrases; standin: crude, needs no download
    language_model   what judges that are models share

Tests: tests/test_judges.py (names, graders, moderation), tests/test_guards.py (models trained to judge).
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib import UserError
from lib.judges import guards, moderation
from lib.judges.graders import grader, parse_grade, parse_harm, parse_refusal, parse_unsafe
from lib.judges.refusals import refusal_label, refusal_labels
from lib.rewards import Labels, Score

__all__ = ["Judge", "load_judge", "refusal_label"]

GRADER = "Qwen/Qwen2.5-7B-Instruct"
TABLES: dict[str, dict[str, tuple[Callable, str]]] = {  # what opens it, (model, device) -> Score; a model
    "harm_score": {
        "qwen3guard": (guards.qwen3guard, "Qwen/Qwen3Guard-Gen-0.6B"),
        "llama-guard": (guards.llama_guard, "meta-llama/Llama-Guard-3-8B"),
        "harmbench": (guards.harmbench, "cais/HarmBench-Llama-2-13b-cls"),
        "strongreject": (partial(grader, "strongreject", parse_harm), GRADER),
        "rubric": (partial(grader, "safety", parse_unsafe), GRADER),
        "moderation": (moderation.harm_judge, "omni-moderation-latest"),
    },
    "task_score": {
        "grm": (guards.reward_model, "Ray2333/GRM-Llama3.2-3B-rewardmodel-ft"),
        "grm-8b": (guards.reward_model, "Ray2333/GRM-llama3-8B-distill"),
        "skywork": (guards.reward_model, "Skywork/Skywork-Reward-V2-Qwen3-0.6B"),
        "rubric": (partial(grader, "help", parse_grade), GRADER),
    },
    "refusal_labels": {"strongreject": (partial(grader, "strongreject", parse_refusal), GRADER)},
}
OWN = {"sandbox": "lib.sandbox.judge", "standin": "lib.judges.refusals", "phrases": "lib.judges.refusals"}
OWN["sandbox-preference"] = "lib.sandbox.preference"
PART = re.compile(r"(?P<name>[^=@]*)(?:=(?P<model>[^@].*?))?(?:@(?P<device>cpu|mps|cuda(?::\d+)?))?")
LABELS = ("full", "partial", "none")
HINT = "HARM+TASK names two; NAME=MODEL a model; NAME@DEVICE a device: cpu, mps, cuda, cuda:NUMBER"


@dataclass
class Judge:
    """A `lib.rewards.Judge` put together from functions."""

    name: str
    harm_score: Score
    task_score: Score
    refusal_labels: Labels = refusal_labels


def load_judge(name: str, refusals: str = "phrases") -> Judge:
    """The judge "sandbox" (exact, for its own prompts only), "standin" (crude), "rubric", or a module.

    "HARM+TASK" takes harm_score from the first and task_score from the second. "grm=MODEL" names a folder or
    a hub's model, "grm@cuda:1" a device (else: the GPU of this process, or the CPU). A module of yours has
    the functions that it is asked for, and may lie in the folder you run from. `refusals`: "phrases",
    "strongreject" (as in the paper; "full" or "none") or a module. Raises UserError if there is no such judge
    and, when scoring, unless there is a verdict on each answer, in its range.
    """
    harm, _, task = name.rpartition("+") if "+" in name else (name, "", name)
    wanted = [("--judge", harm, "harm_score"), ("--judge", task, "task_score")]
    wanted.append(("--refusals", refusals, "refusal_labels"))
    openers = [find(*part) for part in wanted]  # all are found before one is opened: that may take a while
    return Judge(name, *[checked(*part, opener()) for part, opener in zip(wanted, openers, strict=True)])


def find(flag: str, part: str, function: str) -> Callable[[], Callable]:
    """What opens this function of the judge `part`. Raises UserError if it has none."""
    match, table = PART.fullmatch(part), TABLES[function]
    if match and match["name"] in table:
        opener, published = table[match["name"]]
        return lambda: opener(match["model"] or published, match["device"] or "")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(OWN.get(part, part))
    except (ImportError, ValueError, TypeError, SyntaxError) as error:
        allowed = f"allowed {', '.join([*table, *OWN])} or a module of yours ({HINT})"
        raise UserError(f"{flag}: given {part or 'none'} for {function}; {allowed}: {error}") from error
    if not hasattr(module, function):
        raise UserError(f"{flag}: {part} has no function {function}(prompts, answers): write one")
    return lambda: getattr(module, function)


def checked(flag: str, part: str, function: str, judged: Callable) -> Callable:
    """`judged` with a verdict on each answer: a float, a label, or None. It is told contexts if it asks."""
    takes_contexts = "contexts" in inspect.signature(judged).parameters
    labels = LABELS if function == "refusal_labels" else ()

    def verdicts(prompts: list[str], answers: list[str], contexts: Sequence[str] = ()) -> list:
        told = {"contexts": contexts or [""] * len(answers)} if takes_contexts else {}
        given = judged(prompts, answers, **told)
        try:
            found = [x if labels or x is None else float(x) for x in given]
        except (TypeError, ValueError) as error:
            raise UserError(f"{flag}: {part}: {function} gave {given!r:.60}: {error}") from error
        if len(found) != len(answers):
            raise UserError(f"{flag}: {part} gave {len(found)} scores for {len(answers)} answers")
        for prompt, x in zip(prompts, found, strict=True):
            if not (x is None or x in labels or (not labels and 0 <= x <= 1)):  # "not a number" is not
                given = f"gave {x!r} for the prompt {prompt[:60]!r}"
                allowed = f"{', '.join(labels) or 'numbers in [0, 1]'}, None; finished work is kept"
                raise UserError(f"{flag}: {part} {given}; allowed {allowed}")
        return found

    return verdicts
