"""Comparisons over seeds: the studies of lib/compare/studies.py, run by the chapters' own commands.

    python -m lib.compare.study seeds         # the demo at twelve seeds
    python -m lib.compare.study replicate     # the methods side by side, under GCG, PAIR, adaptive attacks
    python -m lib.compare.study ablations     # other lambdas, harmful prompts alone, heavy SFT, and others
    python -m lib.compare.study frontier      # the paper's Figure 2, methods x lambda
    python -m lib.compare.study equal-tokens  # the same, each rival with as many tokens as RL
    python -m lib.compare.study attacks       # all attacks
    python -m lib.compare.study rainbow       # RL with and without the prompts of rainbow teaming
    python -m lib.compare.study --write-docs  # the tables of README and docs, from docs/results

Each run is a process of its own on one core, begun once what it needs is there. Stop it whenever you like:
the same command goes on. OUT/seed-K/NAME is a run, NAME.log beside it its output; OUT/STUDY.json, .md and
.png are the result. No table of README and docs/results.md is written by hand: copy STUDY.json to
docs/results, put `<!-- table NAME: -->` and `<!-- end -->` where table NAME of studies.py belongs, and
--write-docs fills in what is between.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.compare.studies import COMPLIANCE, SAFETY, STUDIES, TASK, Claim, Curves, Key, Study
from lib.compare.tables import caption, markdown, pages, shown
from lib.metrics import Interval
from lib.run.command import Flags, number, run_main
from lib.run.files import read_jsonl, write_text
from lib.run.folder import lock_folder, read_settings

Commands = dict[Path, list[str]]  # a run's folder, OUT/seed-K/NAME: arguments for `python`
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond 10 the last one, a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
SECTIONS = (
    "dsr dsr_by_budget controls worst_case outcomes plane task_score compliance format_rate reasoning_tokens "
    "separation decides diversity twins capability"
).split()
OVER_STEPS = re.compile("reward|reward_.*|reasoning_tokens_.*|refusal_rate_.*")  # of metrics.jsonl


# ---- running


def commands_of(study: Study, folder: Path, flags: str) -> Commands:
    """The study's runs for one seed, in `folder`, which stands in the place of @."""
    commands: Commands = {}
    for name, command in study.runs.items():
        words = (command if f"@{name}/" in command else f"{command} {flags} --out @{name}").split()
        commands[folder / name] = [word.replace("@", f"{folder}/") for word in words]
    return commands


def needs(out: Path, commands: Commands) -> set[Path]:
    """The other runs that it reads: named as FOLDER, NAME=FOLDER or FOLDER/FILE."""
    paths = {Path(part) for word in commands[out] for part in (word, word.partition("=")[2])}
    return (paths | {path.parent for path in paths}) & commands.keys() - {out}


def begin(out: Path, words: Sequence[str]) -> subprocess.Popen:
    """In a session of its own: Ctrl-C reaches this process alone, which then ends its children."""
    out.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
    with open(f"{out}.log", "a", encoding="utf-8") as file:
        print("$ python", *words, file=file, flush=True)
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, **how)


def run_all(commands: Commands, jobs: int) -> None:
    """Run each once what it needs is there, `jobs` at a time, the first ones first.

    Raises UserError with the last line of the first one that fails, and ends the others: a stage loses
    nothing that it had saved, whatever ends it.
    """
    waiting, done = {out: needs(out, commands) for out in commands}, set[Path]()
    running: dict[Path, subprocess.Popen] = {}
    try:
        with tqdm(total=len(commands), unit="run") as bar:
            while waiting or running:
                ready = [out for out, needed in waiting.items() if needed <= done]
                for out in ready[: jobs - len(running)]:
                    del waiting[out]
                    running[out] = begin(out, commands[out])
                time.sleep(0.1)
                for out in [out for out, child in running.items() if child.poll() is not None]:
                    if running.pop(out).returncode:
                        log = Path(f"{out}.log").read_text(encoding="utf-8", errors="replace")
                        last = log.strip().splitlines()[-1]
                        raise UserError(f"{out}.log: {last}; then run the same command again")
                    done.add(out)
                    bar.update()
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()


# ---- reading: {(model, figure): value} of one seed


def training_tokens(run: Path) -> float:
    """Tokens of completions that a run of stage 2 or 3 has sampled, plus those that it has trained on.

    Stage 3 logs both as rates and seconds; RPO trains on the pairs that are no ties. Stage 2 samples nothing
    and trains on `batch_size` traces an update: words, which are tokens in the sandbox, two markers, an end.
    """
    lines, total = read_jsonl(run / "metrics.jsonl"), 0.0
    for x in [x for x in lines if "seconds_train" in x]:
        used = x["pairs"] / (x["pairs"] + x["tied_pairs"]) if "pairs" in x else 1.0
        total += x["sample_tokens_per_s"] * x["seconds_sample"]
        total += x["train_tokens_per_s"] * x["seconds_train"] * used
    if not total:
        settings = read_settings(run)
        traces = read_jsonl(Path(settings["data"]) / settings["traces"])
        words = fmean(len(f"{trace['reasoning']} {trace['answer']}".split()) + 3 for trace in traces)
        total = len(lines) * settings["batch_size"] * words
    return round(total)


def over_steps(run: Path) -> dict[str, float]:
    """Of a run of stage 3, the means over each quarter of its steps: {"training/reward/quarter 1": ...}."""
    lines, found = read_jsonl(run / "metrics.jsonl"), dict[str, float]()
    for quarter in range(4):
        part = lines[quarter * len(lines) // 4 : (quarter + 1) * len(lines) // 4]
        for key in sorted({key for line in part for key in line if OVER_STEPS.fullmatch(key)}):
            known = [line[key] for line in part if line.get(key) is not None]  # None: no thought was closed
            if known:
                found[f"training/{key}/quarter {quarter + 1}"] = fmean(known)
    return found


def flat(results: Any, path: str) -> dict[str, float]:
    """Every mean in a section of results.json, under its path; of a curve [[steps, ci], ...] under its steps.

    >>> flat({"gcg": {"mean": 0.9, "n": 4}, "pair": [[5, {"mean": 1.0}]]}, "dsr")
    {'dsr/gcg': 0.9, 'dsr/pair/5': 1.0}
    """
    entries, means = dict(results), dict[str, float]()
    if "mean" in entries:
        return {path: entries["mean"]}
    for key, entry in entries.items():
        means |= flat(entry, f"{path}/{key}")
    return means


def read_seed(study: Study, folder: Path) -> dict[Key, float]:
    """Of what two evaluations measured, the first one's; how a model's training went, what it has cost, and
    what rainbow teaming found (of a mixture). Then the study's means, areas and claims.
    """
    models: dict[str, dict[str, float]] = defaultdict(dict)
    for name in study.runs:
        if name.startswith("eval-"):
            measured = json.loads((folder / name / "results.json").read_text())["models"]
            for model, results in measured.items():
                for section in SECTIONS:
                    models[model] = flat(results.get(section, {}), section) | models[model]
        if (path := folder / name / "rainbow" / "archive.json").exists():
            archive = json.loads(path.read_text())
            models[name] = flat(archive["harm"], "rainbow/harm") | {"rainbow/filled": archive["filled"]}
    figures: dict[Key, float] = {}
    for model, found in models.items():
        if (folder / model / "metrics.jsonl").exists():
            found["training tokens"] = training_tokens(folder / model)
            found |= over_steps(folder / model)
        figures |= {(model, name): mean_of(found, spec) for name, spec in study.means.items()}
        figures |= {(model, name): value for name, value in found.items() if re.fullmatch(study.shown, name)}
    for method, curve in study.curves.items():
        for axis in (TASK, COMPLIANCE):
            points = [(figures[model, SAFETY], figures[model, axis]) for model in curve.values()]
            figures[method, f"area, {axis}"] = dominated_area(points)
    for claim in [claim for claim in study.claims if claim.other]:
        figures[claim.key] = difference(figures, study.curves, claim)
    return figures


def mean_of(found: dict[str, float], spec: str) -> float:
    """The mean of the figures that `spec` names, or a difference of two; NaN where one is missing.

    >>> mean_of({"a": 1.0, "b": 0.5, "c": 0.25}, "a + b - c")
    0.5
    """
    sides = [[found.get(name, math.nan) for name in side.split(" + ")] for side in spec.split(" - ")]
    return fmean(sides[0]) - sum(map(fmean, sides[1:]))


def dominated_area(points: Iterable[tuple[float, float]]) -> float:
    """Share of the unit square that some point dominates, being as good or better on both axes (hypervolume).

    >>> dominated_area([(1.0, 0.5), (0.5, 1.0), (0.4, 0.4)])
    0.75
    """
    area = height = 0.0
    for x, y in sorted(points, reverse=True):  # from the right: a point adds the strip by which it is higher
        if y > height:
            area, height = area + x * (y - height), y
    return area


def difference(figures: dict[Key, float], curves: Curves, claim: Claim) -> float:
    """Of two models; of methods at equal lambda, then averaged: what has no lambda is the same at each.
    NaN where a figure is missing.
    """
    _, ours, other, _, name = claim
    pairs = [(ours, other)]
    if (ours, name) not in figures and ours in curves:
        pairs = [(model, curves[other].get(share, other)) for share, model in curves[ours].items()]
    return fmean(figures.get((a, name), math.nan) - figures.get((b, name), math.nan) for a, b in pairs)


# ---- over the seeds


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval, which one seed has not, and each seed's value.

    >>> over_seeds([0.9, 1.0, 1.0])
    {'mean': 0.9667, 'low': 0.8232, 'high': 1.1101, 'n': 3, 'each': [0.9, 1.0, 1.0]}
    """
    n, mean = len(values), fmean(values)
    half = T[min(n - 1, len(T)) - 1] * stdev(values) / math.sqrt(n) if n > 1 else None
    low, high = (None, None) if half is None else (round(mean - half, 4), round(mean + half, 4))
    each = [round(value, 4) for value in values]
    return {"mean": round(mean, 4), "low": low, "high": high, "n": n, "each": each}


def draw(curves: Curves, rows: dict[Key, Interval], path: Path) -> None:
    """The paper's Figure 2: safety to the right, help upwards; the means, and every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, axis in zip(panels, (TASK, COMPLIANCE), strict=True):
        for method, curve in curves.items():
            x, y = ([rows[model, name] for model in curve.values()] for name in (SAFETY, axis))
            (line,) = axes.plot([ci["mean"] for ci in x], [ci["mean"] for ci in y], "o-", label=method)
            for share, across, up in zip(curve, x, y, strict=True):
                axes.plot(across["each"], up["each"], ".", color=line.get_color(), alpha=0.4)
                place = (across["mean"], up["mean"])
                axes.annotate(share, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        ylabel = axis.removeprefix("plane/").replace("_", " ")
        axes.set(xlabel=SAFETY, ylabel=ylabel, xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def write(name: str, study: Study, out: Path, seeds: Sequence[dict[Key, float]], about: dict) -> str:
    """NAME.json, what docs/results keeps: `about`, and a row a line of each figure that all seeds have;
    NAME.md and, where matplotlib is, NAME.png. Returns the text.
    """
    each = {key: [seed.get(key, math.nan) for seed in seeds] for key in seeds[0]}
    rows = {key: over_seeds(values) for key, values in each.items() if not any(map(math.isnan, values))}
    objects = [{"model": model, "figure": figure, **ci} for (model, figure), ci in rows.items()]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in objects)
    write_text(out / f"{name}.json", f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')

    points = {model: {"": model} for model, figure in rows if figure == TASK and " - " not in model}
    if curves := study.curves or points:
        with contextlib.suppress(ImportError):  # without matplotlib, the table says the same
            draw(curves, rows, out / f"{name}.png")
    table = markdown({key: shown(ci, key[0]) for key, ci in rows.items()})
    how = f"{caption(about)} Differences are paired by seed, and averaged over lambdas."
    write_text(out / f"{name}.md", text := "\n".join([f"# {name}", "", how, "", *table, ""]))
    return text


def main() -> None:
    flags, whole = Flags("lib.compare.study", __doc__), number(int, 1, 1000)
    flags.add_argument("study", nargs="?", choices=list(STUDIES))
    flags.add_argument("--seeds", type=whole, help="how many; of one there is no interval")
    flags.add_argument("--jobs", type=whole, default=os.cpu_count() or 1, help="runs at a time, a core each")
    flags.add_argument("--out", help="folder (default runs/replicate, runs/frontier and so on)")
    flags.add_argument("--write-docs", action="store_true", help="the tables of README and docs, no study")
    args = flags.parse_args()
    if args.write_docs:
        for page, text in pages().items():
            write_text(page, text)
        return
    if not (name := args.study):
        raise UserError(f"study: none given; allowed {', '.join(STUDIES)}; or --write-docs")
    study = STUDIES[name]
    out = Path(args.out or f"runs/{study.folder}")
    lock_folder(out)
    for end in (signal.SIGTERM, signal.SIGHUP):  # these end the children, too, as Ctrl-C does
        if signal.getsignal(end) != signal.SIG_IGN:  # nohup
            signal.signal(end, signal.default_int_handler)
    seeds = range(study.first_seed, study.first_seed + (args.seeds or study.seeds))
    commands: Commands = {}
    for seed in seeds:
        commands |= commands_of(study, out / f"seed-{seed}", f"--preset sandbox --seed {seed}")
    run_all(commands, args.jobs)
    changed = f" --seeds {args.seeds}" if len(seeds) != study.seeds else ""
    about = {
        "command": f"python -m lib.compare.study {name}{changed}",
        "seeds": list(seeds),
        "date": max(read_settings(run).get("date", "") for run in commands),  # when the last one was begun
        "hardware": f"{os.cpu_count()} CPU cores",
    }
    print(write(name, study, out, [read_seed(study, out / f"seed-{seed}") for seed in seeds], about))


if __name__ == "__main__":
    run_main(main)
