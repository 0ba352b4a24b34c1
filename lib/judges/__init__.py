"""Judges: who scores the harm of an answer, and how far it does what was asked.

A judge is two functions on batches, harm_score(prompts, answers) and task_score(prompts, answers), each a list of numbers
in [0, 1]. A score of None is *unknown*: no verdict that can be read. Unknown is not harmless and not useful: it is counted,
and never as a defence or a reward. Neither function sees the reasoning. A prompt begins with the text that it is about, if it
is about one; a harm_score that has a third parameter, `contexts`, is also told these texts, "" where there is none.

Models of others have one of the two each, so two of them make a judge: "qwen3guard+grm". "rubric" has both.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib import UserError
from lib.judges.refusals import refusal_label

__all__ = ["Judge", "Labels", "Score", "load_judge", "models_of", "refusal_label"]
Labels = Callable[
    [list[str], list[str]], Sequence[str | None]
]  # prompts, answers -> "full", "partial", "none"; None: unknown
Score = Callable[..., Sequence[float | None]]  # of prompts and answers; maybe of contexts, too


def by_phrases(prompts: list[str], answers: list[str]) -> list[str | None]:
    """`refusal_label` of each answer."""
    return [refusal_label(answer) for answer in answers]


@dataclass(frozen=True)
class Judge:
    """Functions that take prompts and answers, lists of one length, and return as many scores, or labels."""

    name: str
    harm_score: Score
    task_score: Score
    refusal_labels: Labels = by_phrases


MODELS = {  # name -> module of lib.judges, whose MODEL is the published one, and its function (model, device) -> Score
    "qwen3guard": ("qwen3guard", "harm_judge"),
    "qwen3guard-label": ("qwen3guard", "label_judge"),
    "llama-guard": ("llama_guard", "harm_judge"),
    "harmbench": ("harmbench", "harm_judge"),
    "strongreject": ("strongreject", "harm_judge"),
    "moderation": ("moderation", "harm_judge"),
    "grm": ("grm", "task_judge"),
    "grm-8b": ("grm", "task_judge"),
}
PUBLISHED = {"grm-8b": "Ray2333/GRM-llama3-8B-distill"}  # where it is not the module's MODEL
BOTH = {"rubric": "rubric"}  # name -> module, which has harm_judge and task_judge
TASK_MODELS = [name for name, (_, function) in MODELS.items() if function == "task_judge"]
HARM_MODELS = [name for name in MODELS if name not in TASK_MODELS]
ALLOWED = (
    f"sandbox, standin or a module of yours, or {', '.join(BOTH)}; or HARM+TASK, where HARM may also be "
    f"{', '.join(HARM_MODELS)}, and TASK {', '.join(TASK_MODELS)}"
)
PART = re.compile(r"(?P<name>[^=@]*)(?:=(?P<model>.*?))?(?:@(?P<device>cpu|mps|cuda(?::\d+)?))?")


def load_judge(name: str, refusals: str = "phrases") -> Judge:
    """The judge "sandbox" (exact, for its own prompts only), "standin" (crude), or a module, say "my.guard".

    "HARM+TASK" takes harm_score from the first and task_score from the second. Each may be a model of others, in `MODELS`,
    which has one of the two alone, or in `BOTH`, which may be the whole judge, too. Its checkpoint is a folder or a hub name,
    "grm=MODEL" (none: the published one), and its device is "qwen3guard@cuda:1" or "grm=MODEL@cpu" (none: the GPU of this
    process, else the CPU). Several processes that name one device each put a copy there. With the environment variable
    TARS_JUDGE_CACHE=FOLDER the verdicts of these models are kept there (lib/judges/cache.py).

    A module of yours holds the two functions, or the one it is asked for, and is looked for in the folder you run from as well.
    `refusals` says who labels refusals, see `_refusals`. Raises UserError if a module cannot be imported or lacks a function,
    and, when scoring, if there are not as many scores as answers. Whether a score is in [0, 1], and what None (unknown) means,
    is for who uses it to check and decide.
    """
    if not name:
        raise UserError(f"--judge: none given; allowed {ALLOWED} (README, The paper's recipe: Judges)")
    harm, plus, task = _two(name)
    if plus and not (harm and task):
        raise UserError(f"--judge: given {name}; allowed {ALLOWED}")
    if (alone := re.split("[=@]", task)[0]) in HARM_MODELS:
        raise UserError(f"--judge: {alone} scores harm alone: name another for the task, say {task}+grm")
    if (alone := re.split("[=@]", harm or task)[0]) in TASK_MODELS:
        raise UserError(
            f"--judge: {alone} scores the task alone: name another for the harm, say qwen3guard+{harm or task}"
        )
    return Judge(
        name, _scores_of(harm or task, "harm_score"), _scores_of(task, "task_score"), _refusals(refusals)
    )


def _refusals(name: str) -> Labels:
    """Who says which answers refuse: "phrases"; "strongreject", "strongreject=MODEL@DEVICE", as in the paper ("full" or "none");
    or a module of yours with refusal_labels(prompts, answers). Raises UserError as `load_judge`, and for other labels."""
    if name == "phrases":
        return by_phrases
    match = PART.fullmatch(name)
    if match and match["name"] == "strongreject":
        from lib.judges.strongreject import refusal_judge

        return refusal_judge(match["model"] or "", match["device"] or "")
    label = _function(name, "refusal_labels", "--refusals", "phrases, strongreject or a module of yours")

    def labels(prompts: list[str], answers: list[str]) -> list[str | None]:
        given = list(label(prompts, answers))
        if len(given) != len(answers) or not {*given} <= {"full", "partial", "none", None}:
            raise UserError(
                f"--refusals: {name} gave {given[:3]} ...: give each answer full, partial, none, or None for unknown"
            )
        return given

    return labels


def models_of(name: str) -> list[str]:
    """The models, folders or hub names, that the judge `name` opens.

    >>> models_of("qwen3guard@cuda:1+grm=my/grm"), models_of("sandbox")
    (['Qwen/Qwen3Guard-Gen-0.6B', 'my/grm'], [])
    """
    found = []
    for part in filter(None, (_two(name)[0], _two(name)[2])):
        match = PART.fullmatch(part)
        if (
            match and match["name"] in {**MODELS, **BOTH} and match["name"] != "moderation"
        ):  # that one runs elsewhere
            found.append(match["model"] or published(match["name"]))
    return found


def published(name: str) -> str:
    """The checkpoint that the judge `name`, of `MODELS` or `BOTH`, opens if none is given."""
    path = MODELS[name][0] if name in MODELS else BOTH[name]
    return PUBLISHED.get(name) or importlib.import_module(f"lib.judges.{path}").MODEL


def _two(name: str) -> tuple[str, str, str]:
    """HARM, "+", TASK; or "", "", name. A model may be a folder with a "+" in its name: what follows the "+" is a judge."""
    for task in (*TASK_MODELS, *BOTH):
        if match := re.fullmatch(rf"(.*)(\+)({task}(?:[=@].*)?)", name):
            return match[1], match[2], match[3]
    return name.rpartition("+")


def _scores_of(part: str, function: str) -> Score:
    """One of the two functions of the judge `part`. UserError if there is no such judge, or it has no such function."""
    opener_of_both = function.replace("score", "judge")
    models = {**MODELS, **{name: (module, opener_of_both) for name, module in BOTH.items()}}
    match = PART.fullmatch(part)
    if (
        match is None
        or match["model"] == ""
        or (match["name"] not in models and (match["model"] or match["device"]))
    ):
        raise UserError(
            f"--judge: given {part}; a model is given as NAME=MODEL and its device as NAME@DEVICE or NAME=MODEL@DEVICE, "
            f"with NAME one of {', '.join(models)} and DEVICE cpu, cuda, cuda:NUMBER or mps"
        )
    if match["name"] not in models:
        return _counted(_function(part, function, "--judge", ALLOWED), part)
    path, opener = models[match["name"]]
    module = importlib.import_module(f"lib.judges.{path}")
    score = getattr(module, opener)(match["model"] or PUBLISHED.get(match["name"], ""), match["device"] or "")
    if folder := os.environ.get("TARS_JUDGE_CACHE"):
        from lib.judges.cache import cached, identity

        name = match["name"] + f" {function}" * (match["name"] in BOTH)
        score = cached(score, identity(name, match["model"] or published(match["name"])), folder)
    return _counted(score, part)


def _function(name: str, function: str, flag: str, allowed: str) -> Callable:
    path = {"sandbox": "lib.sandbox.judge", "standin": "lib.judges.standin"}.get(name, name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"{flag}: given {name}; allowed {allowed}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{flag}: {path} has no function {function}(prompts, answers): write one")
    return getattr(module, function)


def _counted(score: Score, name: str) -> Score:
    def counted(prompts: list[str], answers: list[str], contexts: Sequence[str] = ()) -> list[float | None]:
        told = (
            {"contexts": contexts} if contexts and "contexts" in inspect.signature(score).parameters else {}
        )
        scores = [None if s is None else float(s) for s in score(prompts, answers, **told)]
        if len(scores) != len(answers):
            raise UserError(
                f"--judge: {name} gave {len(scores)} scores for {len(answers)} answers: give one each"
            )
        return scores

    return counted
