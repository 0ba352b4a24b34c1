"""The studies of `python -m lib.compare.study`: what each runs and shows, what that says to the paper's
findings, and the tables of README and docs.

A run is a line, NAME: its command. `@NAME` is the folder of another run, which has to be finished first. The
preset, the seed and --out are added, but for a run that writes to @ITSELF. A figure is a path in a
results.json, "SECTION/KEY".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SAFETY, TASK, COMPLIANCE = "DSR", "plane/task_score", "plane/compliance"  # the last two of all benign prompts
MAIN = (SAFETY, TASK, COMPLIANCE)
AREAS = (f"area, {TASK}", f"area, {COMPLIANCE}")
FINDINGS = {  # of the paper; `claims` below say in which figures they would show
    "F1": "best frontier of safety and refusals; RL *and* reasoning are needed",
    "F2": "larger lambda: safer, more refusals, shorter thought",
    "F3": "more thought on ambiguous than on harmful prompts",
    "F4": "RL on harmful prompts alone: reward saturates, thought gets short, the ambiguous are refused",
    "F5": "heavy SFT before RL: less diverse samples, a narrower frontier",
    "F6": "ambiguous prompts cut refusals at equal safety",
    "F7": "two rewards reach further than one preference reward",
    "F8": "best under GCG and PAIR; SFT above RL without reasoning under GCG, below it under PAIR",
    "F9": "harmful and ambiguous prompts come apart inside",
    "F10": "SFT and DPO hardly react to lambda; the base's capabilities stay, more than with those two",
}
Key = tuple[str, str]  # a model, a method or a difference; and a figure of it
Curves = dict[str, dict[str, str]]  # method: {lambda: model}


class Claim(NamedTuple):
    """A finding of the paper says of a figure: ours - other (with other "", ours) is > 0, < 0 or = 0."""

    finding: str  # F1 to F10; "": no claim, only shown
    ours: str  # a model, or a method over its lambdas
    other: str
    sign: str
    figure: str

    @property
    def key(self) -> Key:
        return f"{self.ours} - {self.other}" if self.other else self.ours, self.figure


def claims(finding: str, ours: str, others: str, sign: str, *figures: str) -> list[Claim]:
    names = others.split() or [""]
    return [Claim(finding, ours, other, sign, figure) for other in names for figure in figures]


@dataclass(frozen=True)
class Study:
    folder: str  # below runs/; two studies may share runs there
    seeds: int  # so many, unless told otherwise
    first_seed: int  # those below were looked at while the world was made, or belong to another study
    runs: dict[str, str]
    means: dict[str, str]  # figure: of others the mean, A + B, or a difference of means, A + B - C
    shown: str  # the other figures, a regular expression
    claims: Sequence[Claim]
    curves: Curves = field(default_factory=dict)


def asked(models: str, flags: str = "", command: str = "04_attack_eval.py --data @data") -> str:
    paths = [f"{name}=lib/sandbox/base" if name == "base" else f"{name}=@{name}" for name in models.split()]
    return f"{command} {flags} --models {' '.join(paths)}"


# ---- the demo's models, and the methods side by side (F1, F3, F8 to F10)

# A direct answer is short; the pull and the temperature are tuned.
DIRECT = "--no-reasoning --max-new-tokens 12 --kl-coef 0.3 --temperature 0.7"
# What RL reads comes from chapter 1 a second time, behind pi_SFT. Its evaluation sets are those of the first.
MIXTURE = "01_build_mixture.py --rainbow @sft --rl-traces 8"
# The paper's rate is ten times that of its light SFT; of 2e-4, 6e-4 and 2e-3 the best on prompts held out.
EIGHT = "--traces sft_rl.jsonl --learning-rate 6e-4"
METHODS = {
    "tars": "03_rl_train.py --data @mixture --model @sft",
    "rl-direct": f"03_rl_train.py --data @mixture --model @sft-direct {DIRECT}",
    "sft8": f"02_sft_warmstart.py --data @mixture --model @sft {EIGHT}",
    "rpo": "-m lib.compare.rpo --data @mixture --model @sft",
    # as many tokens as tars, sampled and trained on together, in the sandbox
    "rl-direct-long": f"03_rl_train.py --data @mixture --model @sft-direct {DIRECT} --epochs 3",
    "sft8-long": f"02_sft_warmstart.py --data @mixture --model @sft {EIGHT} --epochs 2",
    "rpo-long": "-m lib.compare.rpo --data @mixture --model @sft --epochs 1.25",
    "heavy": "03_rl_train.py --data @mixture --model @sft-heavy",
    "one-reward": "03_rl_train.py --data @mixture --model @sft --one-reward --judge sandbox-preference",
}
WARM = {
    "data": "01_build_mixture.py",
    "sft": "02_sft_warmstart.py --data @data",
    "sft-direct": "02_sft_warmstart.py --data @data --no-reasoning",
}
TRAINED = WARM | {"mixture": MIXTURE, "rl-direct": METHODS["rl-direct"], "tars": METHODS["tars"]}
DEMO = TRAINED | {"eval-main": asked("base sft rl-direct tars", "--no-reasoning base")}
ALL, REASONERS = "base sft rl-direct tars sft8 rpo", "sft tars sft8 rpo"
DIVERSITY, LOSS = "-m lib.compare.diversity --data @data", "-m lib.tools.capability --loss"
REPLICATE = TRAINED | {
    "sft8": METHODS["sft8"],
    "rpo": METHODS["rpo"],
    "early": f"{METHODS['tars']} --epochs 0.25",  # `tars` at a quarter of its steps, if the rate still rises
    "documents": "-m lib.sandbox.pretrain --documents @documents/held_out.jsonl",
    "eval-main": asked(ALL, "--attacks gcg pair --no-reasoning base"),
    "eval-adaptive": asked(REASONERS, "--attacks gcg_close gcg_forged gcg_twin --behaviours 12"),
    "eval-decides": asked(REASONERS, "--eval @eval-main", "-m lib.compare.decides --data @data"),
    "eval-diversity": asked("sft early tars", "", DIVERSITY),
    "eval-loss": asked(ALL, "--file @documents/held_out.jsonl --no-reasoning base", LOSS),
}
DEPTH = "reasoning_tokens/{0}/3 hops + reasoning_tokens/{0}/4 hops"  # at equal depth
THOUGHT = {f"thought, {kind}": DEPTH.format(kind) for kind in ("harmful", "harmless", "ambiguous")}
MEANS = {
    SAFETY: "dsr/direct + dsr/jailbreak",
    **THOUGHT,
    "thought, decoy - harmful": f"{DEPTH.format('ambiguous/decoy')} - {DEPTH.format('harmful')}",
    "thought, verb - harmless": f"{DEPTH.format('ambiguous/verb')} - {DEPTH.format('harmless')}",
}
SHOWN = (
    "(dsr|controls|task_score|compliance|format_rate|outcomes/gcg|rainbow|twins|capability)/.*"
    "|plane/(task_score|compliance)|dsr_by_budget/plain_or_gcg/(5|10)|separation/.*/(accuracy|margin)"
    "|decides/(?!.*step ).*|training tokens"
)
GCG, PAIR = "dsr/plain_or_gcg", "dsr/plain_or_pair"
COMPARED = claims("F1", "tars", "sft rl-direct", ">", *MAIN, GCG)
REPLICATED = [
    *COMPARED,
    *claims("F3", "tars", "", ">", "thought, decoy - harmful", "thought, verb - harmless"),
    *claims("F3", "tars", "", ">", "twins/decoy_minus_harmful", "twins/toy_minus_harmful"),
    *claims("F8", "tars", "sft8 rpo rl-direct", ">", GCG, PAIR),
    *claims("F8", "sft8", "rl-direct", ">", GCG),
    *claims("F8", "sft8", "rl-direct", "<", PAIR),
    *claims("F9", "tars", "base sft8 rpo", ">", "separation/before/accuracy", "separation/before/margin"),
    *claims("F9", "tars", "sft8 rpo", ">", "separation/after/accuracy"),
    *claims("F10", "tars", "base", "=", "capability/loss_behind_first"),
    *claims("F10", "tars", "sft8 rpo", "<", "capability/loss_behind_first"),
]

# ---- over lambda: each method at each, from one pi_SFT, on the same evaluation (the paper's Figure 2)


def frontier(lambdas: Sequence[float], methods: Sequence[str], claimed=(), attacked: int = 12) -> Study:
    """`attacked`: direct requests under GCG; without, DSR is the mean of direct requests and disguises."""
    budget = f"--behaviours {attacked}"
    runs = WARM | {"eval-references": asked("base sft", f"{budget} --no-reasoning base")}
    curves = {"base": {"": "base"}, "sft": {"": "sft"}}
    for share in map(str, lambdas):
        runs[f"data-{share}"] = f"{MIXTURE} --lambda-harmful {share}"
        for method in methods:
            model = curves.setdefault(method, {})[share] = f"{method}-{share}"
            runs[model] = METHODS[method].replace("@mixture", f"@data-{share}")
            runs[f"eval-{model}"] = asked(model, budget)
    means = {SAFETY: MEANS[SAFETY] + (f" + {GCG}" if attacked else ""), **THOUGHT}
    shown = "dsr/(direct|jailbreak|plain_or_gcg)|plane/(task_score|compliance)|training tokens"
    others = " ".join(other for other in curves if other != "tars")
    claimed = [*claims("", "tars", others, ">", *MAIN, *AREAS), *claimed]
    return Study("frontier", 5, 40, runs, means, shown, claimed, curves)


LARGER_LAMBDA = [
    *claims("F2", "tars-0.9", "tars-0.1", ">", SAFETY),
    *claims("F2", "tars-0.9", "tars-0.1", "<", COMPLIANCE, *THOUGHT),
]
BY_LAMBDA = [
    *claims("F1", "tars", "sft8 rpo rl-direct", ">", *AREAS),
    *LARGER_LAMBDA,
    *claims("F10", "sft8-0.9", "sft8-0.1", "=", SAFETY, COMPLIANCE),
    *claims("F10", "rpo-0.9", "rpo-0.1", "=", SAFETY, COMPLIANCE),
]

# ---- what each part of the recipe is for (F4 to F7): one thing changed at a time

# Heavy is 10/3 of the rate and twice the epochs, as in the paper. An early stop would keep the best of them.
HEAVY = "02_sft_warmstart.py --data @data --learning-rate 6.7e-4 --epochs 2 --held-out-share 0"
DIVERSE = ("diversity/distinct_reasonings", "diversity/entropy", "diversity/two_rewards")
ABLATED = [
    *LARGER_LAMBDA,
    *claims("F4", "harmful-only", "tars-0.5", "<", "compliance/ambiguous", TASK),
    *claims("F4", "harmful-only", "tars-0.5", ">", "training/reward_harmful/quarter 1"),
    *claims("F4", "harmful-only", "tars-0.5", "<", "training/reasoning_tokens_harmful/quarter 4"),
    *claims("F5", "sft-heavy", "sft", "<", *DIVERSE),
    *claims("F5", "heavy", "tars", "<", *AREAS),
    *claims("F6", "tars-0.5", "plain-only", ">", "compliance/ambiguous"),
    *claims("F6", "tars-0.5", "plain-only", "=", SAFETY),
    *claims("F7", "tars", "one-reward", ">", *AREAS),
]


def ablations() -> Study:
    study = frontier((0.1, 0.5, 0.9), ("tars", "heavy", "one-reward"), ABLATED, attacked=0)
    runs, rl = WARM | {"sft-heavy": HEAVY} | study.runs, METHODS["tars"]
    for name, flags in {"harmful-only": "--lambda-harmful 1", "plain-only": "--ambiguous-share 0"}.items():
        runs[f"data-{name}"] = f"{MIXTURE} {flags}"
        runs[name] = rl.replace("@mixture", f"@data-{name}")
        runs[f"eval-{name}"] = asked(name, "--behaviours 0")
    runs["eval-heavy"] = asked("sft sft-heavy", "", DIVERSITY)
    shown = f"{study.shown}|(compliance|task_score|diversity)/.*"
    shown += "|training/(reward|reasoning_tokens|refusal_rate)_(harmful|ambiguous)/.*"
    return replace(study, folder="replicate", first_seed=30, runs=runs, shown=shown)


# ---- all attacks; and RL with and without rainbow teaming's prompts (paper, appendix E)

EVERY = "--attacks all --behaviours 60 --no-reasoning base"
ATTACKED = TRAINED | {"eval-all": asked("base sft rl-direct tars", EVERY)}
RAINBOW = {name: TRAINED[name] for name in ("data", "sft", "mixture")} | {
    "without": "03_rl_train.py --data @data --model @sft",
    "with": METHODS["tars"],
    "eval-asking": asked("without with", "--attacks pair best_of_n pap --behaviours 60"),
    "eval-gcg": asked("without with", "--attacks gcg --behaviours 24"),
}
ATTACKS = ["dsr/direct", "dsr/jailbreak", PAIR, "dsr/plain_or_best_of_n", "dsr/plain_or_pap", GCG]
WITH, FOUND = claims("", "with", "without", "", *MAIN, *ATTACKS), "(dsr|plane|rainbow)/.*"

LAMBDAS, RIVALS = (0.1, 0.3, 0.5, 0.7, 0.9), ("rl-direct", "sft8", "rpo")
LONG = ("rl-direct-long", "sft8-long", "rpo-long")
STUDIES = {
    "seeds": Study("seeds", 12, 72, DEMO, MEANS, SHOWN, COMPARED),
    "replicate": Study("replicate", 5, 30, REPLICATE, MEANS, SHOWN, REPLICATED),
    "ablations": ablations(),
    "frontier": frontier(LAMBDAS, ("tars", *RIVALS), BY_LAMBDA),
    "equal-tokens": frontier(LAMBDAS, ("tars", *LONG), claims("F1", "tars", " ".join(LONG), ">", *AREAS)),
    "attacks": Study("replicate", 3, 30, ATTACKED, MEANS, "(dsr|controls|worst_case)/.*", []),
    "rainbow": Study("rainbow", 8, 50, RAINBOW, {SAFETY: " + ".join(ATTACKS)}, FOUND, WITH),
}

# ---- the tables of README and docs/results.md, written by lib/compare/tables.py
# By name: a study; models, or differences; and figures, {heading: figure}, or all that a regular expression
# matches. Without models, a row a seed, of figures "MODEL: FIGURE".


def points(*methods: str, lambdas: Sequence[float] = LAMBDAS) -> list[str]:
    return [f"{method}-{share}" for method in methods for share in lambdas]


def beside_tars(others: Sequence[str]) -> list[str]:
    return ["tars", *others, *(f"tars - {other}" for other in others)]


MODELS = ("base", "sft", "rl-direct", "tars")
BRIEF = {
    "DSR, direct requests": "dsr/direct",
    "DSR, held-out disguises": "dsr/jailbreak",
    "DSR, plain or GCG": GCG,
    "compliance, harmless and ambiguous": COMPLIANCE,
    "task score, the same prompts": TASK,
}
KINDS = ("harmless", "ambiguous/toy", "ambiguous/decoy", "ambiguous/verb")
EACH = {heading: f"tars: {figure}" for heading, figure in BRIEF.items() if figure not in MAIN}
EACH |= {f"task score, {kind}": f"tars: task_score/{kind}" for kind in KINDS}
EACH |= {f"plain or GCG, above {other}": f"tars - {other}: {GCG}" for other in ("sft", "rl-direct")}
PLANE = {"DSR": SAFETY, "compliance": COMPLIANCE, "task score": TASK}
AREA = {"area, task score": AREAS[0], "area, compliance": AREAS[1]}
PARTS = ("tars", "heavy", "one-reward")
SIDES = ("tars-0.5", "harmful-only", "plain-only")
TABLES: dict[str, tuple[str, Sequence[str], Mapping[str, str] | str]] = {
    "main": ("seeds", MODELS, BRIEF),  # README's
    "each-seed": ("seeds", (), EACH),
    "kinds": ("seeds", MODELS, "(controls|outcomes/gcg|compliance|task_score|format_rate)/.*"),
    "methods": ("replicate", ALL.split(), "(dsr|plane|capability)/.*|training tokens"),
    "inside": ("replicate", ALL.split(), "separation/.*"),
    "verdicts": ("replicate", REASONERS.split(), "decides/(agreement|no verdict|follows|keeps|leaks)/.*"),
    "allowed": ("replicate", REASONERS.split(), r"decides/(dsr|dsr/gcg|task|thinks on)/(\d+|all)"),
    "thoughts": ("replicate", ("sft", "early", "tars", "sft8", "rpo"), "twins/.*|thought.*"),
    "parts": ("ablations", [*points(*PARTS, lambdas=(0.1, 0.5, 0.9)), "harmful-only", "plain-only"], PLANE),
    "parts-kinds": ("ablations", SIDES, "(compliance|task_score)/(harmless|ambiguous/.*)"),
    "parts-steps": ("ablations", SIDES, "training/.*"),
    "parts-areas": ("ablations", PARTS, AREA),
    "diversity": ("ablations", ("sft", "sft-heavy"), "diversity/.*"),
    "frontier": ("frontier", points("tars", *RIVALS), PLANE),
    "areas": ("frontier", beside_tars(RIVALS), AREA),
    "thought": ("frontier", points("tars"), "thought.*"),
    "equal-tokens": ("equal-tokens", points("tars", *LONG), PLANE | {"tokens": "training tokens"}),
    "equal-areas": ("equal-tokens", beside_tars(LONG), AREA),
    "attacks": ("attacks", MODELS, "dsr/(plain_or_.*|pap_mean)|controls/.*|worst_case/.*"),
    "rainbow": ("rainbow", ("without", "with", "with - without"), "dsr/.*|plane/task_score"),
}
