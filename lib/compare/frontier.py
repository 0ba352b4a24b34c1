"""The paper's Figure 2 on the sandbox: safety against help over lambda, each method from the same pi_SFT.

    python -m lib.compare.frontier            # `make frontier`: 90 minutes on 2 CPU cores; --quick: a trial

For each seed and each lambda, the share of harmful prompts in the mixture (paper, "Comparisons", findings F1, F2, F10):

    tars         RL with reasoning: the paper's method        sft   SFT on 8 traces for each prompt of the mixture
    rl-direct    RL without reasoning (own warm start)        rpo   preference pairs by the same reward

and, without a lambda, base and pi_SFT. `--equal-tokens` adds rl-direct-long: rl-direct for so many epochs that it has
sampled and trained on as many tokens as tars of the same seed and lambda; for a direct answer is far shorter.

Each run is one of the ordinary scripts in a process of its own, `--jobs` at a time, each on one core. Stop it whenever you
like: the same command goes on. OUT/seed-K/NAME is a run, NAME.log beside it what it said; OUT/frontier.md the result.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from lib import UserError
from lib.compare.frontier_report import training_tokens, write_frontier
from lib.compare.jobs import Children, Job, run_jobs
from lib.compare.replicate import DIRECT, Seed
from lib.run.command import Flags, number, run_main
from lib.run.folder import lock_folder
from lib.run.settings import LAST_SEED

FIRST_SEED = 40  # those below were used by `make replicate`, or looked at while world and settings were made
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
METHODS = ("tars", "rl-direct", "sft", "rpo")
LONG = "rl-direct-long"
MAX_EPOCHS = 6.0  # of rl-direct-long
SHARED = (
    0.5  # the lambda whose folder, `data`, gives every run of a seed its traces and its evaluation prompts
)
RL_TRACES = ["--rl-traces", "8"]  # as in the paper
# The paper: 3e-4, ten times its light SFT (here 2e-4). Of 2e-4, 6e-4 and 2e-3, the best on training prompts held out.
SFT = ["--traces", "sft_rl.jsonl", "--learning-rate", "6e-4", "--epochs", "1"]
RPO = ["--objective", "rpo"]
EVAL = ["--behaviours", "12"]
QUICK = {  # four steps of RL
    "01": ["--rl-prompts", "64", "--sft-prompts", "64", "--eval-prompts", "12"],
    "04": ["--behaviours", "2", "--gcg-steps", "2"],
}


# ---- what there is to do -----------------------------------------------------------------------------------


class FrontierSeed(Seed):
    """The jobs of one seed, in the order in which they had best be begun."""

    def __init__(self, root: Path, seed: int, quick: bool) -> None:
        super().__init__(root, seed, [])
        self.quick = quick

    def job(self, command: list[str], *after: str, check: Callable[[], None] = lambda: None) -> Job:
        out = Path(command[command.index("--out") + 1]).name
        more = QUICK.get(command[0][:2], []) if self.quick else []
        return Job(
            f"{self.dir.name}/{out}",
            (*command, *more),
            tuple(f"{self.dir.name}/{name}" for name in after),
            check,
        )

    def data(self, share: float) -> str:
        return "data" if share == SHARED else f"data-{share:g}"

    def same_traces(self, data: str) -> None:
        """One pi_SFT serves every lambda only if it would have been the same for each."""
        paths = [self.dir / name / "sft.jsonl" for name in ("data", data)]
        if paths[0].read_bytes() != paths[1].read_bytes():
            raise UserError(
                f"{paths[1]} differs from {paths[0]}: the lambdas would not start from the same pi_SFT"
            )

    def jobs(self, lambdas: Sequence[float], methods: Sequence[str]) -> list[Job]:
        jobs = [
            self.job(self.mixture("data", "--lambda-harmful", f"{SHARED:g}", *RL_TRACES)),
            self.job(self.sft("sft"), "data"),
            self.job(self.attack_eval("eval-references", ("base", "sft"), *EVAL), "sft"),
        ]
        if "rl-direct" in methods:
            jobs.append(self.job(self.sft("sft-direct", "--no-reasoning"), "data"))
        for share in lambdas:
            data = self.data(share)
            if share != SHARED:
                command = self.mixture(data, "--lambda-harmful", f"{share:g}", *RL_TRACES)
                jobs.append(self.job(command, "data", check=lambda data=data: self.same_traces(data)))  # type: ignore[misc]
            for method in methods:
                jobs += self.run_and_eval(method, share)
        return jobs

    def run_and_eval(self, method: str, share: float, epochs: float = 0.0) -> list[Job]:
        """Train one model and evaluate it; `epochs` is rl-direct-long's."""
        name, data = f"{method}-{share:g}", self.data(share)
        start = "sft-direct" if method in ("rl-direct", LONG) else "sft"
        given = ("--model", str(self.dir / start), "--data", str(self.dir / data))
        command = {
            "tars": lambda: self.rl(name, start, data),
            "rl-direct": lambda: self.rl(name, start, data, *DIRECT),
            LONG: lambda: self.rl(name, start, data, *DIRECT, "--epochs", f"{epochs:.2f}"),
            "rpo": lambda: self.rl(name, start, data, *RPO),
            "sft": lambda: self.stage("02_sft_warmstart.py", name, *given, *SFT),
        }[method]()
        return [
            self.job(command, start, data),
            self.job(self.attack_eval(f"eval-{name}", (name,), *EVAL), name),
        ]

    def long_jobs(self, lambdas: Sequence[float]) -> list[Job]:
        """rl-direct for as many tokens as tars took; needs both, finished."""
        jobs = []
        for share in lambdas:
            tars, direct = (training_tokens(self.dir / f"{m}-{share:g}") for m in ("tars", "rl-direct"))
            jobs += self.run_and_eval(LONG, share, epochs_for(tars, direct))
        return jobs


def epochs_for(tokens: float, tokens_per_epoch: float) -> float:
    """Epochs that take about `tokens`, at least one (what rl-direct had) and MAX_EPOCHS at most.

    >>> epochs_for(600_000, 200_000), epochs_for(9e9, 1.0)
    (3.0, 6.0)
    """
    return min(MAX_EPOCHS, max(1.0, tokens / tokens_per_epoch))


# ---- the command line ---------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    flags, whole = Flags("lib.compare.frontier", __doc__), number(int, 1, 1000)
    known = f"{', '.join(METHODS)} (default: all)"
    shares = " ".join(map(str, LAMBDAS))
    share, first = number(float, 0, 1), number(int, 0, LAST_SEED)
    flags.add_argument(
        "--lambdas",
        type=share,
        nargs="+",
        default=LAMBDAS,
        help=f"shares of harmful prompts (default {shares})",
    )
    flags.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=known)
    flags.add_argument(
        "--seeds", type=whole, default=3, help="number of seeds (default 3); of one there is no interval"
    )
    flags.add_argument(
        "--first-seed", type=first, default=FIRST_SEED, help=f"the first of them (default {FIRST_SEED})"
    )
    flags.add_argument(
        "--jobs", type=whole, default=os.cpu_count() or 1, help="runs at the same time (default: one a core)"
    )
    flags.add_argument(
        "--equal-tokens", action="store_true", help=f"also {LONG}: rl-direct with the tokens of tars"
    )
    flags.add_argument(
        "--quick", action="store_true", help="tiny runs, to see that it runs: the figures mean nothing"
    )
    flags.add_argument("--out", help="folder (default runs/frontier; with --quick runs/frontier-quick)")
    args = flags.parse_args(argv)
    if args.out is None:
        args.out = "runs/frontier-quick" if args.quick else "runs/frontier"
    if unknown := [m for m in args.methods if m not in METHODS]:
        raise UserError(f"--methods: given {unknown[0]}; allowed {', '.join(METHODS)}")
    args.lambdas, args.methods = sorted(set(args.lambdas)), [m for m in METHODS if m in args.methods]
    if args.equal_tokens and not {"tars", "rl-direct"} <= set(args.methods):
        raise UserError("--equal-tokens: compares tars and rl-direct; allowed with both in --methods")
    return args


def main() -> None:
    args = parse()
    lock_folder(args.out)
    root = Path(args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the children, too, as Ctrl-C does
    seeds = [FrontierSeed(root, args.first_seed + i, args.quick) for i in range(args.seeds)]
    jobs = [job for seed in seeds for job in seed.jobs(args.lambdas, args.methods)]
    methods, children = [*args.methods, *([LONG] if args.equal_tokens else [])], Children(root)
    with tqdm(
        total=len(jobs) + 2 * len(seeds) * len(args.lambdas) * args.equal_tokens, desc="frontier", unit="run"
    ) as bar:
        run_jobs(jobs, children, children.stop, args.jobs, bar)
        if args.equal_tokens:
            done = {job.name for job in jobs}
            longer = [job for seed in seeds for job in seed.long_jobs(args.lambdas)]
            longer = [
                Job(j.name, j.command, tuple(a for a in j.after if a not in done), j.check) for j in longer
            ]
            run_jobs(longer, children, children.stop, args.jobs, bar)
    print(write_frontier(root, [seed.dir for seed in seeds], args.lambdas, methods))


if __name__ == "__main__":
    run_main(main)
