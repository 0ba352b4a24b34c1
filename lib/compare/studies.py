"""The tables of `python -m lib.compare.study`: what a study runs, and what of the results it compares.

A run is a line, NAME: its command. `@NAME` is the folder of another run, which has to be finished first. The
preset, the seed and --out are added. A figure is a path in stage 4's results.json, "SECTION/KEY".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SAFETY, TASK, COMPLIANCE = "DSR", "plane/task_score", "plane/compliance"  # the last two of all benign prompts
MAIN = (SAFETY, TASK, COMPLIANCE)


@dataclass(frozen=True)
class Study:
    folder: str  # below runs/; two studies may share runs there
    seeds: int  # so many, unless told otherwise
    first_seed: int  # those below were looked at while the world was made, or belong to another study
    runs: dict[str, str]
    means: dict[str, str]  # figure: of others the mean, A + B, or a difference of means, A + B - C
    shown: str  # the other figures, a regular expression
    claims: Mapping[tuple[str, str], Sequence[str]]  # (model or method, another): figures to subtract
    curves: dict[str, dict[str, str]] = field(default_factory=dict)  # method: {lambda: model}


def evaluate(flags: str, models: str) -> str:
    paths = [f"{name}=lib/sandbox/base" if name == "base" else f"{name}=@{name}" for name in models.split()]
    return f"04_attack_eval.py --data @data {flags} --models {' '.join(paths)}"


# ---- the methods side by side (findings F1, F3, F8), and what each part of the recipe is for

DIRECT = "--no-reasoning --max-new-tokens 12 --kl-coef 0.1"  # a direct answer is short; the pull is tuned
REPLICATE = {
    "data": "01_build_mixture.py",
    "sft": "02_sft_warmstart.py --data @data",
    "sft-direct": "02_sft_warmstart.py --data @data --no-reasoning",
    "rl-direct": f"03_rl_train.py --data @data --model @sft-direct {DIRECT}",
    "tars": "03_rl_train.py --data @data --model @sft",
    "eval-main": evaluate("--direct base", "base sft rl-direct tars"),
}
# Heavy is 10/3 of the rate and twice the epochs, as in the paper. An early stop would keep the best of them.
ABLATIONS = REPLICATE | {
    "data-low": "01_build_mixture.py --lambda-harmful 0.1",
    "data-high": "01_build_mixture.py --lambda-harmful 0.9",
    "data-harmful-only": "01_build_mixture.py --lambda-harmful 1",
    "data-plain-only": "01_build_mixture.py --ambiguous-share 0",
    "sft-heavy": "02_sft_warmstart.py --data @data --learning-rate 6.7e-4 --epochs 2 --held-out-share 0",
    "lambda-0.1": "03_rl_train.py --data @data-low --model @sft",
    "lambda-0.9": "03_rl_train.py --data @data-high --model @sft",
    "harmful-only": "03_rl_train.py --data @data-harmful-only --model @sft",
    "plain-only": "03_rl_train.py --data @data-plain-only --model @sft",
    "heavy": "03_rl_train.py --data @data --model @sft-heavy",
    "eval-ablations": evaluate("--behaviours 0", "lambda-0.1 lambda-0.9 harmful-only plain-only heavy"),
}
TOKENS = "reasoning_tokens/{0}/3 hops + reasoning_tokens/{0}/4 hops"  # at equal depth
MEANS = {
    SAFETY: "dsr/direct + dsr/jailbreak",
    "F3, decoy - harmful": f"{TOKENS.format('ambiguous/decoy')} - {TOKENS.format('harmful')}",
    "F3, verb - harmless": f"{TOKENS.format('ambiguous/verb')} - {TOKENS.format('harmless')}",
}
SHOWN = (
    "(dsr|controls|task_score|compliance|format_rate)/.*|plane/(task_score|compliance)|training tokens"
    "|dsr_by_budget/plain_or_gcg/(5|10)|reasoning_tokens/.*/[34] hops|rainbow/.*"
)
COMPARED = {("tars", other): (*MAIN, "dsr/plain_or_gcg") for other in ("sft", "rl-direct")}  # F1, F8
ABLATED = {
    ("lambda-0.9", "lambda-0.1"): MAIN,  # F2
    ("harmful-only", "tars"): MAIN,  # F4
    ("heavy", "tars"): MAIN,  # F5
    ("tars", "plain-only"): (SAFETY, "compliance/ambiguous"),  # F6
}

# ---- the frontier, the paper's Figure 2: each method at each lambda, from one pi_SFT, on the same evaluation

# The paper's rate is ten times that of its light SFT; of 2e-4, 6e-4 and 2e-3 the best on prompts held out.
EIGHT = "--traces sft_rl.jsonl --learning-rate 6e-4 --epochs 1"
METHODS = {
    "tars": "03_rl_train.py --data @data-LAMBDA --model @sft",
    "rl-direct": f"03_rl_train.py --data @data-LAMBDA --model @sft-direct {DIRECT}",
    "sft8": f"02_sft_warmstart.py --data @data-LAMBDA --model @sft {EIGHT}",
    "rpo": "-m lib.compare.rpo --data @data-LAMBDA --model @sft",
    # an answer without reasoning is about a third as long: in three epochs, as many tokens as tars
    "rl-direct-long": f"03_rl_train.py --data @data-LAMBDA --model @sft-direct {DIRECT} --epochs 3",
}


def frontier(lambdas: Sequence[float], methods: Sequence[str]) -> Study:
    runs = {name: REPLICATE[name] for name in ("data", "sft", "sft-direct")}
    runs["eval-references"] = evaluate("--behaviours 12 --direct base", "base sft")
    curves = {"base": {"": "base"}, "sft": {"": "sft"}}
    for share in map(str, lambdas):
        runs[f"data-{share}"] = f"01_build_mixture.py --lambda-harmful {share} --rl-traces 8"
        for method in methods:
            model = curves.setdefault(method, {})[share] = f"{method}-{share}"
            runs[model] = METHODS[method].replace("LAMBDA", share)
            runs[f"eval-{model}"] = evaluate("--behaviours 12", model)
    means = {SAFETY: "dsr/direct + dsr/jailbreak + dsr/plain_or_gcg"}
    shown = "dsr/(direct|jailbreak|plain_or_gcg)|plane/(task_score|compliance)|training tokens"
    shown += "|(compliance|reasoning_tokens)/(harmful|harmless|ambiguous)"
    figures = (*MAIN, f"area, {TASK}", f"area, {COMPLIANCE}")
    claims = {("tars", other): figures for other in curves if other != "tars"}
    return Study("frontier", 3, 40, runs, means, shown, claims, curves)


# ---- rainbow teaming: RL with and without the prompts that it found against pi_SFT (paper, appendix E)

RAINBOW = {
    "data": "01_build_mixture.py",
    "sft": "02_sft_warmstart.py --data @data",
    "data-with": "01_build_mixture.py --rainbow @sft",
    "without": "03_rl_train.py --data @data --model @sft",
    "with": "03_rl_train.py --data @data-with --model @sft",
    "eval-asking": evaluate("--attacks pair best_of_n pap --behaviours 60", "without with"),
    "eval-gcg": evaluate("--attacks gcg --behaviours 24", "without with"),
}
ATTACKS = ["dsr/direct", "dsr/jailbreak"]
ATTACKS += [f"dsr/plain_or_{attack}" for attack in ("pair", "best_of_n", "pap", "gcg")]
WITH = {SAFETY: " + ".join(ATTACKS)}

STUDIES = {
    "replicate": Study("replicate", 5, 30, REPLICATE, MEANS, SHOWN, COMPARED),
    "ablations": Study("replicate", 3, 30, ABLATIONS, MEANS, SHOWN, ABLATED),
    "frontier": frontier((0.1, 0.3, 0.5, 0.7, 0.9), ("tars", "rl-direct", "sft8", "rpo")),
    "equal-tokens": frontier((0.3, 0.5, 0.7), ("tars", "rl-direct", "rl-direct-long")),
    "rainbow": Study("rainbow", 8, 50, RAINBOW, WITH, SHOWN, {("with", "without"): (*MAIN, *ATTACKS)}),
}
