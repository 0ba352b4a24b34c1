"""What the rainbow archive buys: RL on the mixture with prompts found by rainbow teaming against RL without (paper, appendix E).

    python -m lib.compare.rainbow_gain        # half an hour on 2 CPU cores; --seeds 2 for a first look

For each seed, from one pi_SFT: stage 1 with `--rainbow` searches for prompts that pi_SFT answers harmfully, and puts them
in the place of 0.4 of the harmful RL prompts (the paper: 800 of 2000); stage 3 trains `plain` without and `with` with them;
stage 4 attacks both. Stop it whenever you like: the same command goes on. OUT/seed-K/NAME is a run, NAME.log beside it what
it said; OUT/rainbow.md the result.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lib.compare.frontier_report import over_seeds, shown, table
from lib.compare.jobs import Children, Job, run_jobs
from lib.compare.replicate import Get, Seed, cell
from lib.run.command import Flags, number, run_main
from lib.run.files import write_text
from lib.run.folder import lock_folder
from lib.run.settings import LAST_SEED

FIRST_SEED = (
    50  # those below were used by `make replicate` and `make frontier`, or looked at while the world was made
)
MODELS = ("plain", "with")
ATTACKS = {  # evaluation: its flags
    "eval-asking": ("--attacks", "pair", "best_of_n", "pap", "--behaviours", "60"),
    "eval-gcg": ("--attacks", "gcg", "--behaviours", "24"),
}
FIGURES: dict[str, tuple[str, Get]] = {  # figure: the evaluation that it is read from
    **{f"DSR, {attack}": ("eval-asking", cell("dsr", attack)) for attack in ("direct", "jailbreak")},
    **{
        f"DSR, plain_or_{attack}": ("eval-asking", cell("dsr", f"plain_or_{attack}"))
        for attack in ("pair", "best_of_n", "pap")
    },
    "DSR, plain_or_gcg": ("eval-gcg", cell("dsr", "plain_or_gcg")),
    "compliance": ("eval-asking", cell("plane", "compliance")),
    "task score": ("eval-asking", cell("plane", "task_score")),
}


class GainSeed(Seed):
    def jobs(self) -> list[Job]:
        """In the order in which they had best be begun."""
        at = self.dir.name
        found, start = ("--rainbow", str(self.dir / "sft")), "sft"
        commands: list[tuple[list[str], tuple[str, ...]]] = [  # and what they need
            (self.mixture("data"), ()),
            (self.sft("sft"), ("data",)),
            (self.mixture("data-rainbow", *found), ("sft",)),
            (self.rl("plain", start), ("sft",)),
            (self.rl("with", start, "data-rainbow"), ("data-rainbow",)),
            *((self.attack_eval(name, MODELS, *flags), MODELS) for name, flags in ATTACKS.items()),
        ]
        name = lambda command: Path(command[command.index("--out") + 1]).name  # noqa: E731
        return [Job(f"{at}/{name(c)}", tuple(c), tuple(f"{at}/{n}" for n in needs)) for c, needs in commands]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def report(seeds: Sequence[Path]) -> str:
    """Markdown: each figure without and with the archive, the difference paired by seed, and what the searches found."""
    lines = [
        "# Rainbow teaming on the sandbox",
        "",
        f"Mean over {len(seeds)} seeds [95 % interval, Student's t].",
        "",
    ]
    rows = []
    for figure, (evaluation, get) in FIGURES.items():
        results = [read_json(seed / evaluation / "results.json")["models"] for seed in seeds]
        plain, found = ([get(r[model]) for r in results] for model in MODELS)
        gain = [b - a for a, b in zip(plain, found, strict=True)]
        each = ", ".join(f"{a:.2f} > {b:.2f}" for a, b in zip(plain, found, strict=True))
        rows.append(
            [figure, shown(over_seeds(plain)), shown(over_seeds(found)), shown(over_seeds(gain), "+"), each]
        )
    lines += table(["", "without", "with", "with - without", "each seed"], rows)
    archives = [read_json(seed / "data-rainbow" / "rainbow" / "archive.json") for seed in seeds]
    rows = []
    for seed, archive in zip(seeds, archives, strict=True):
        filled = ", ".join(f"{one['filled']}" for one in archive["archives"])
        rows.append([seed.name, filled, *(shown(archive["harm"][key]) for key in ("plain", "archive"))])
    lines += [
        "Harm of fresh answers of pi_SFT, to plain harmful prompts and to those found [95 % interval over prompts]:",
        "",
    ]
    lines += table(["", "cells filled in each archive", "plain prompts", "prompts found"], rows)
    return "\n".join(lines)


def main() -> None:
    cores, whole = os.cpu_count() or 1, number(int, 1, 1000)
    flags = Flags("lib.compare.rainbow_gain", __doc__)
    flags.add_argument(
        "--seeds", type=whole, default=8, help="number of seeds (default 8); of one there is no interval"
    )
    first = number(int, 0, LAST_SEED)
    flags.add_argument(
        "--first-seed", type=first, default=FIRST_SEED, help=f"the first of them (default {FIRST_SEED})"
    )
    flags.add_argument(
        "--jobs", type=whole, default=cores, help="runs at the same time (default: one a core)"
    )
    flags.add_argument("--out", default="runs/rainbow", help="folder (default runs/rainbow)")
    args = flags.parse_args()
    lock_folder(args.out)
    root = Path(args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the children, too, as Ctrl-C does
    seeds = [GainSeed(root, args.first_seed + i, []) for i in range(args.seeds)]
    jobs, children = [job for seed in seeds for job in seed.jobs()], Children(root)
    with tqdm(total=len(jobs), desc="rainbow", unit="run") as bar:
        run_jobs(jobs, children, children.stop, args.jobs, bar)
    text = report([seed.dir for seed in seeds])
    write_text(root / "rainbow.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
