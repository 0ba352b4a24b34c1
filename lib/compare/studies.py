"""The studies of `python -m lib.compare.study`: what each runs, shows, and says to the paper's findings.

A run is a line, NAME: its command. `@NAME` is the folder of another run, which has to be finished first. The
preset, the seed and --out are added. A figure is a path in a results.json, "SECTION/KEY".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SAFETY, TASK, COMPLIANCE = "DSR", "plane/task_score", "plane/compliance"  # the last two of all benign prompts
MAIN = (SAFETY, TASK, COMPLIANCE)
AREAS = (f"area, {TASK}", f"area, {COMPLIANCE}")
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


def evaluate(flags: str, models: str, command: str = "04_attack_eval.py") -> str:
    paths = [f"{name}=lib/sandbox/base" if name == "base" else f"{name}=@{name}" for name in models.split()]
    return f"{command} --data @data {flags} --models {' '.join(paths)}"


# ---- the demo's models, and the methods side by side (F1, F3, F8 to F10)

DIRECT = "--no-reasoning --max-new-tokens 12 --kl-coef 0.1"  # a direct answer is short; the pull is tuned
# What RL reads comes from chapter 1 a second time, behind pi_SFT. Its evaluation sets are those of the first.
MIXTURE = "01_build_mixture.py --rainbow @sft --rl-traces 8"
# The paper's rate is ten times that of its light SFT; of 2e-4, 6e-4 and 2e-3 the best on prompts held out.
EIGHT = "--traces sft_rl.jsonl --learning-rate 6e-4 --epochs 1"
METHODS = {
    "tars": "03_rl_train.py --data @mixture --model @sft",
    "rl-direct": f"03_rl_train.py --data @mixture --model @sft-direct {DIRECT}",
    "sft8": f"02_sft_warmstart.py --data @mixture --model @sft {EIGHT}",
    "rpo": "-m lib.compare.rpo --data @mixture --model @sft",
    # an answer without reasoning is about a third as long: in three epochs, as many tokens as tars
    "rl-direct-long": f"03_rl_train.py --data @mixture --model @sft-direct {DIRECT} --epochs 3",
    "heavy": "03_rl_train.py --data @mixture --model @sft-heavy",
    "one-reward": "03_rl_train.py --data @mixture --model @sft --one-reward --judge sandbox-preference",
}
WARM = {
    "data": "01_build_mixture.py",
    "sft": "02_sft_warmstart.py --data @data",
    "sft-direct": "02_sft_warmstart.py --data @data --no-reasoning",
}
TRAINED = WARM | {"mixture": MIXTURE, "rl-direct": METHODS["rl-direct"], "tars": METHODS["tars"]}
DEMO = TRAINED | {"eval-main": evaluate("--direct base", "base sft rl-direct tars")}
REPLICATE = TRAINED | {
    "sft8": METHODS["sft8"],
    "rpo": METHODS["rpo"],
    "early": f"{METHODS['tars']} --epochs 0.25",  # `tars` at a quarter of its steps, if the rate still rises
    "eval-main": evaluate("--attacks gcg pair --direct base", "base sft rl-direct tars sft8 rpo"),
    "eval-adaptive": evaluate("--attacks gcg_close gcg_forged gcg_twin", "sft tars sft8 rpo"),
    "eval-decides": evaluate("--eval @eval-main", "sft tars sft8 rpo", "-m lib.compare.decides"),
    "eval-diversity": evaluate("", "sft early tars", "-m lib.compare.diversity"),
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
    "(dsr|controls|task_score|compliance|format_rate|outcomes/gcg|rainbow|decides|twins|capability)/.*"
    "|plane/(task_score|compliance)|dsr_by_budget/plain_or_gcg/(5|10)|separation/.*|training tokens"
)
GCG, PAIR = "dsr/plain_or_gcg", "dsr/plain_or_pair"
COMPARED = claims("F1", "tars", "sft rl-direct", ">", *MAIN, GCG)
REPLICATED = [
    *COMPARED,
    *claims("F3", "tars", "", ">", "thought, decoy - harmful", "thought, verb - harmless"),
    *claims("F8", "tars", "sft8 rpo rl-direct", ">", GCG, PAIR),
    *claims("F8", "sft8", "rl-direct", ">", GCG),
    *claims("F8", "sft8", "rl-direct", "<", PAIR),
    *claims("F9", "tars", "base sft8 rpo", ">", "separation/before/accuracy", "separation/before/margin"),
    *claims("F9", "tars", "sft8 rpo", ">", "separation/after/accuracy"),
]

# ---- over lambda: each method at each, from one pi_SFT, on the same evaluation (the paper's Figure 2)


def frontier(lambdas: Sequence[float], methods: Sequence[str], claimed: Sequence[Claim] = ()) -> Study:
    asked = "--behaviours 12"
    runs = WARM | {"eval-references": evaluate(f"{asked} --direct base", "base sft")}
    curves = {"base": {"": "base"}, "sft": {"": "sft"}}
    for share in map(str, lambdas):
        runs[f"data-{share}"] = f"{MIXTURE} --lambda-harmful {share}"
        for method in methods:
            model = curves.setdefault(method, {})[share] = f"{method}-{share}"
            runs[model] = METHODS[method].replace("@mixture", f"@data-{share}")
            runs[f"eval-{model}"] = evaluate(asked, model)
    means = {SAFETY: f"dsr/direct + dsr/jailbreak + {GCG}", **THOUGHT}
    shown = "dsr/(direct|jailbreak|plain_or_gcg)|plane/(task_score|compliance)|training tokens"
    others = " ".join(other for other in curves if other != "tars")
    claimed = [*claims("", "tars", others, ">", *MAIN, *AREAS), *claimed]
    return Study("frontier", 5, 40, runs, means, shown, claimed, curves)


AT_EACH = claims("F1", "tars", "sft8 rpo rl-direct", ">", *AREAS)
BY_LAMBDA = [
    *claims("F2", "tars-0.9", "tars-0.1", ">", SAFETY),
    *claims("F2", "tars-0.9", "tars-0.1", "<", COMPLIANCE, *THOUGHT),
    *claims("F10", "sft8-0.9", "sft8-0.1", "=", SAFETY, COMPLIANCE),
    *claims("F10", "rpo-0.9", "rpo-0.1", "=", SAFETY, COMPLIANCE),
]

# ---- what each part of the recipe is for (F4 to F7): one thing changed at a time

# Heavy is 10/3 of the rate and twice the epochs, as in the paper. An early stop would keep the best of them.
HEAVY = "02_sft_warmstart.py --data @data --learning-rate 6.7e-4 --epochs 2 --held-out-share 0"
ABLATED = [
    *claims("F4", "harmful-only", "tars-0.5", "<", "compliance/ambiguous", TASK),
    *claims("F4", "harmful-only", "tars-0.5", ">", "training/reward/quarter 1"),
    *claims("F4", "harmful-only", "tars-0.5", "<", "training/reasoning_tokens_harmful/quarter 4"),
    *claims("F5", "heavy", "tars", "<", *AREAS),
    *claims("F6", "tars-0.5", "plain-only", ">", "compliance/ambiguous"),
    *claims("F6", "tars-0.5", "plain-only", "=", SAFETY),
    *claims("F7", "tars", "one-reward", ">", *AREAS),
]


def ablations() -> Study:
    study = frontier((0.1, 0.5, 0.9), ("tars", "heavy", "one-reward"), ABLATED)
    runs, rl = WARM | {"sft-heavy": HEAVY} | study.runs, METHODS["tars"]
    for name, flags in {"harmful-only": "--lambda-harmful 1", "plain-only": "--ambiguous-share 0"}.items():
        runs[f"data-{name}"] = f"{MIXTURE} {flags}"
        runs[name] = rl.replace("@mixture", f"@data-{name}")
        runs[f"eval-{name}"] = evaluate("--behaviours 12", name)
    runs["eval-heavy"] = evaluate("", "sft sft-heavy", "-m lib.compare.diversity")
    shown = f"{study.shown}|(compliance|task_score|diversity)/.*|training/.*"
    return replace(study, folder="replicate", first_seed=30, runs=runs, shown=shown)


# ---- all attacks; and RL with and without rainbow teaming's prompts (paper, appendix E)

ATTACKED = TRAINED | {
    "eval-all": evaluate("--attacks all --behaviours 60 --direct base", "base sft rl-direct tars"),
}
RAINBOW = {name: TRAINED[name] for name in ("data", "sft", "mixture")} | {
    "without": "03_rl_train.py --data @data --model @sft",
    "with": METHODS["tars"],
    "eval-asking": evaluate("--attacks pair best_of_n pap --behaviours 60", "without with"),
    "eval-gcg": evaluate("--attacks gcg --behaviours 24", "without with"),
}
ATTACKS = ["dsr/direct", "dsr/jailbreak"]
ATTACKS += [f"dsr/plain_or_{attack}" for attack in ("pair", "best_of_n", "pap", "gcg")]
WITH = {SAFETY: " + ".join(ATTACKS)}

ASKED = claims("", "with", "without", "", *MAIN, *ATTACKS)

LAMBDAS, RIVALS = (0.1, 0.3, 0.5, 0.7, 0.9), ("tars", "rl-direct", "sft8", "rpo")
LONG = ("tars", "rl-direct", "rl-direct-long")
STUDIES = {
    "seeds": Study("seeds", 12, 60, DEMO, MEANS, SHOWN, COMPARED),
    "replicate": Study("replicate", 5, 30, REPLICATE, MEANS, SHOWN, REPLICATED),
    "ablations": ablations(),
    "frontier": frontier(LAMBDAS, RIVALS, AT_EACH + BY_LAMBDA),
    "equal-tokens": frontier(LAMBDAS, LONG, claims("F1", "tars", "rl-direct-long", ">", *AREAS)),
    "attacks": Study("replicate", 3, 30, ATTACKED, MEANS, "(dsr|controls|worst_case)/.*", []),
    "rainbow": Study("rainbow", 8, 50, RAINBOW, WITH, SHOWN, ASKED),
}
