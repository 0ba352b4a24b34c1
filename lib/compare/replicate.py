"""Run the four chapters for several seeds on the sandbox, with the paper's main comparisons, and tabulate them.

    python -m lib.compare.replicate           # `make replicate`: about half an hour on 2 CPU cores; --seeds 2 for a first look

For each seed, everything is drawn anew: the world's prompts and traces, SFT, RL, evaluation prompts and attacks. The models:

    sft          the warm start alone                             tars         + RL with reasoning: the paper's method
    rl-direct    RL without reasoning (from its own warm start)   lambda-0.1, lambda-0.9   F2: other shares of harmful prompts
    harmful-only F4: RL on harmful prompts alone                  heavy        F5: RL from a heavy warm start
    plain-only   F6: harmless prompts in place of ambiguous ones

Each is one run of the ordinary scripts, resumable like them: a killed replication goes on where it was. Everything lands
in runs/replicate/seed-K/; the summary in runs/replicate/report.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lib import UserError
from lib.metrics import student_t
from lib.run.command import Flags, number, run_main
from lib.run.files import write_text
from lib.run.folder import lock_folder

FIRST_SEED = 30  # the results of smaller ones were looked at while world and settings were made
Get = Callable[[dict], float]
MODELS = {
    "main": ("base", "sft", "rl-direct", "tars"),
    "ablations": ("lambda-0.1", "lambda-0.9", "harmful-only", "heavy"),
    "ambiguity": ("plain-only",),
}
DIRECT = ["--no-reasoning", "--max-new-tokens", "12", "--kl-coef", "0.1"]  # tuned: see README
# The paper: 10/3 of the rate, twice the epochs. No early stop: it would save the best of them, which is not heavy.
HEAVY = ["--learning-rate", "6.7e-4", "--epochs", "2", "--held-out-share", "0"]


def cell(*keys: str) -> Get:
    """A getter of one figure's mean out of a model's results; NaN where the evaluation had no such prompts."""

    def get(results: dict) -> float:
        for key in keys:
            results = results.get(key, {})
        return results.get("mean", math.nan)

    return get


def average(*getters: Get) -> Get:
    return lambda results: sum(g(results) for g in getters) / len(getters)


def after(attack: str, steps: int) -> Get:
    """DSR against what an attack has tried within so many steps."""
    return lambda results: (
        dict(results.get("dsr_by_budget", {}).get(attack, [])).get(steps, {}).get("mean", math.nan)
    )


AMBIGUOUS = ("ambiguous/toy", "ambiguous/decoy", "ambiguous/verb")
KINDS = ("harmful", "harmless", "ambiguous/decoy", "ambiguous/verb")  # not toy, whose name is a word longer
COLUMNS: dict[str, Get] = {
    "DSR direct": cell("dsr", "direct"),
    "DSR jailbreak": cell("dsr", "jailbreak"),
    "DSR plain or GCG": cell("dsr", "plain_or_gcg"),
    **{f"DSR plain or GCG, {steps} steps": after("plain_or_gcg", steps) for steps in (5, 10)},
    "DSR GCG": cell("dsr", "gcg"),
    **{f"DSR {c}": cell("controls", c) for c in ("no suffix", "initial suffix", "random suffix")},
    **{f"comply {k.split('/')[-1]}": cell("compliance", k) for k in ("harmless", *AMBIGUOUS)},
    **{f"task {k.split('/')[-1]}": cell("task_score", k) for k in ("harmless", *AMBIGUOUS)},
    **{f"well-formed {s}": cell("format_rate", s) for s in ("direct", "jailbreak", "harmless", "ambiguous")},
    **{f"tokens {k}, {h} hops": cell("reasoning_tokens", f"{k}/{h} hops") for h in (3, 4) for k in KINDS},
}
SAFETY = average(COLUMNS["DSR direct"], COLUMNS["DSR jailbreak"])
HELP = average(*(COLUMNS[f"task {k.split('/')[-1]}"] for k in ("harmless", *AMBIGUOUS)))
COMPLIANCE = average(*(COLUMNS[f"comply {k.split('/')[-1]}"] for k in AMBIGUOUS))
THOUGHT = {k: average(*(COLUMNS[f"tokens {k}, {h} hops"] for h in (3, 4))) for k in KINDS}
Side = tuple[str, Get]  # a model, and a figure of it
CLAIMS: dict[str, tuple[Side, Side]] = {  # name: the two sides of a difference
    "F1 safety (DSR direct, jailbreak): tars - sft": (("tars", SAFETY), ("sft", SAFETY)),
    "F1 help (task score, 4 kinds): tars - sft": (("tars", HELP), ("sft", HELP)),
    "F1 safety: tars - rl-direct": (("tars", SAFETY), ("rl-direct", SAFETY)),
    "F1 help: tars - rl-direct": (("tars", HELP), ("rl-direct", HELP)),
    "F2 safety: lambda 0.9 - lambda 0.1": (("lambda-0.9", SAFETY), ("lambda-0.1", SAFETY)),
    "F2 help: lambda 0.9 - lambda 0.1": (("lambda-0.9", HELP), ("lambda-0.1", HELP)),
    "F3 reasoning tokens of tars at equal hops: decoy - harmful": (
        ("tars", THOUGHT["ambiguous/decoy"]),
        ("tars", THOUGHT["harmful"]),
    ),
    "F3, the same: verb - harmless": (("tars", THOUGHT["ambiguous/verb"]), ("tars", THOUGHT["harmless"])),
    "F4 help: harmful only - tars": (("harmful-only", HELP), ("tars", HELP)),
    "F5 help: heavy - tars": (("heavy", HELP), ("tars", HELP)),
    "F5 safety: heavy - tars": (("heavy", SAFETY), ("tars", SAFETY)),
    "F6 compliance (3 ambiguous kinds): tars - plain-only": (
        ("tars", COMPLIANCE),
        ("plain-only", COMPLIANCE),
    ),
    "F6 safety: tars - plain-only": (("tars", SAFETY), ("plain-only", SAFETY)),
    "F8 DSR, plain or GCG: tars - sft": (
        ("tars", COLUMNS["DSR plain or GCG"]),
        ("sft", COLUMNS["DSR plain or GCG"]),
    ),
    "F8 DSR, plain or GCG: tars - rl-direct": (
        ("tars", COLUMNS["DSR plain or GCG"]),
        ("rl-direct", COLUMNS["DSR plain or GCG"]),
    ),
}


class Seed:
    """The commands of one seed, in order; each a list of arguments for `python`."""

    def __init__(self, root: Path, seed: int, extra: list[str]) -> None:
        self.dir, self.seed, self.extra = root / f"seed-{seed}", seed, extra

    def stage(self, script: str, out: str, *flags: str) -> list[str]:
        return [script, "--preset", "sandbox", "--seed", str(self.seed), "--out", str(self.dir / out), *flags]

    def mixture(self, out: str, *flags: str) -> list[str]:
        return self.stage("01_build_mixture.py", out, *flags)

    def sft(self, out: str, *flags: str) -> list[str]:
        return self.stage("02_sft_warmstart.py", out, "--data", str(self.dir / "data"), *flags)

    def rl(self, out: str, model: str, data: str = "data", *flags: str) -> list[str]:
        given = ("--model", str(self.dir / model), "--data", str(self.dir / data))
        return self.stage("03_rl_train.py", out, *given, *flags, *self.extra)

    def attack_eval(self, out: str, models: tuple[str, ...], *flags: str) -> list[str]:
        paths = [f"{m}=lib/sandbox/base" if m == "base" else f"{m}={self.dir / m}" for m in models]
        given = [
            "--data",
            str(self.dir / "data"),
            "--models",
            *paths,
            *(["--direct", "base"] if "base" in models else []),
        ]
        return self.stage("04_attack_eval.py", out, *given, *flags)

    def main(self) -> list[list[str]]:
        return [
            self.mixture("data"),
            self.sft("sft"),
            self.sft("sft-direct", "--no-reasoning"),
            self.rl("rl-direct", "sft-direct", "data", *DIRECT),
            self.rl("tars", "sft"),
            self.attack_eval("eval-main", MODELS["main"]),
        ]

    def ablations(self) -> list[list[str]]:
        shares = {"lambda-0.1": "0.1", "lambda-0.9": "0.9", "harmful-only": "1.0"}
        flags = {m: ("--lambda-harmful", share) for m, share in shares.items()} | {
            "plain-only": ("--ambiguous-share", "0")
        }
        jobs = [self.mixture(f"data-{m}", *given) for m, given in flags.items()]
        jobs += [self.rl(m, "sft", f"data-{m}") for m in flags]
        jobs += [self.sft("sft-heavy", *HEAVY), self.rl("heavy", "sft-heavy")]
        return jobs + [
            self.attack_eval(f"eval-{m}", MODELS[m], "--behaviours", "0") for m in ("ablations", "ambiguity")
        ]


def run_all(jobs: list[list[str]], log: Path, threads: int, bar: tqdm, after: Future | None = None) -> None:
    """Run commands one after another, appending their output to `log`; raises UserError with the last line of a failure."""
    if after:
        after.result()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for job in jobs:
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(
                [sys.executable, *job], stdout=file, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
            raise UserError(f"{job[0]} failed ({last}): see {log}, then run the same command again")
        bar.update()


def load_results(root: Path, counts: dict[str, int]) -> dict[str, list[dict]]:
    """{model: [results of each seed]}"""
    results: dict[str, list[dict]] = {m: [] for models in MODELS.values() for m in models}
    for part, models in MODELS.items():
        for seed in range(FIRST_SEED, FIRST_SEED + counts[part]):
            found = json.loads(
                (root / f"seed-{seed}" / f"eval-{part}" / "results.json").read_text(encoding="utf-8")
            )["models"]
            for model in models:
                results[model].append(found[model])
    return results


def report(results: dict[str, list[dict]]) -> str:
    """Markdown: every figure as mean [95 % t-interval] over seeds, the worst seed, and the paired differences."""
    lines = [
        "# Replication on the sandbox",
        "",
        "Mean over seeds [95 % interval, Student's t]; then the lowest of the seeds.",
    ]
    lines += [
        "",
        "| | " + " | ".join(f"{model} ({len(runs)} seeds)" for model, runs in results.items()) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name, get in COLUMNS.items():
        row = []
        for runs in results.values():
            values = [get(r) for r in runs]
            ci = student_t(values)
            shown = f"{ci['mean']:.2f} [{ci['low']:.2f}, {ci['high']:.2f}]; {min(values):.2f}"
            row.append("-" if math.isnan(ci["mean"]) else shown)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "Differences, paired by seed:", "", "| claim | difference | each seed |", "|---|---|---|"]
    for name, ((model, get), (other, get_other)) in CLAIMS.items():
        pairs = zip(results[model], results[other], strict=False)  # both from the first seed on
        values = [get(a) - get_other(b) for a, b in pairs]
        ci = student_t(values)
        each = ", ".join(f"{v:+.2f}" for v in values)
        lines.append(f"| {name} | {ci['mean']:+.2f} [{ci['low']:+.2f}, {ci['high']:+.2f}] | {each} |")
    return "\n".join(lines) + "\n"


def draw_plane(out: Path, results: dict[str, list[dict]]) -> str:
    """Safety against help, a dot a seed, as plane.png in `out`; returns its line of markdown. "" without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for model, runs in results.items():
        marker = "o" if model in MODELS["main"] else "^"
        axes.plot(
            [HELP(r) for r in runs], [SAFETY(r) for r in runs], marker, label=model, alpha=0.75, markersize=8
        )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    axes.set(
        xlabel="task score, mean of harmless, toy, decoy, verb",
        ylabel="DSR, mean of direct and held-out disguises",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center")
    figure.savefig(out / "plane.png", dpi=120)
    return "\n![safety against help, a dot a seed](plane.png)\n"


def main() -> None:
    flags = Flags("lib.compare.replicate", __doc__)
    flags.add_argument(
        "--seeds",
        type=number(int, 2, 1000),
        default=5,
        help=f"number of seeds, from {FIRST_SEED} on (default 5)",
    )
    flags.add_argument(
        "--ablation-seeds",
        type=number(int, 2, 1000),
        default=3,
        help="of these, with the ablations (default 3)",
    )
    flags.add_argument(
        "--jobs", type=number(int, 1, 1000), default=2, help="seeds that run at the same time (default 2)"
    )
    flags.add_argument("--out", default="runs/replicate", help="folder (default runs/replicate)")
    flags.add_argument(
        "--rl-flags", default="", help='more flags for every 03_rl_train.py, one string (default "")'
    )
    args = flags.parse_args()
    lock_folder(args.out)
    root = Path(args.out)
    counts = {"main": args.seeds} | dict.fromkeys(
        ("ablations", "ambiguity"), min(args.seeds, args.ablation_seeds)
    )
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    plan = [Seed(root, FIRST_SEED + i, args.rl_flags.split()) for i in range(args.seeds)]
    total = sum(len(s.main()) for s in plan) + sum(len(s.ablations()) for s in plan[: args.ablation_seeds])
    with tqdm(total=total, desc="replicate", unit="job") as bar, ThreadPoolExecutor(args.jobs) as pool:
        first = [pool.submit(run_all, s.main(), s.dir / "main.log", threads, bar) for s in plan]
        rest = [
            pool.submit(run_all, s.ablations(), s.dir / "ablations.log", threads, bar, f)
            for s, f in zip(plan[: args.ablation_seeds], first, strict=False)
        ]
        try:
            for future in [*first, *rest]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = load_results(root, counts)
    text = report(results) + draw_plane(root, results)
    write_text(root / "report.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
