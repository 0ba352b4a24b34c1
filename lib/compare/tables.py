"""The tables of README and docs/results.md, from docs/results/STUDY.json: none has a number by hand.

`python -m lib.compare.study --write-docs` writes table NAME between the two lines

    <!-- table NAME: the command that gave its numbers -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import UserError
from lib.compare.studies import AREAS, COMPLIANCE, GCG, LAMBDAS, MAIN, PAIR, SAFETY, STUDIES, TASK, Key
from lib.metrics import Interval

Results = dict[str, Any]  # command, seeds, date, hardware; rows: {(model, figure): interval over the seeds}
ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/results.md")
MARKED = re.compile(r"<!-- table ([\w-]+):.*? -->\n.*?<!-- end -->", re.S)
ALIKE = 0.05  # two figures are equal for us if the interval of their difference lies within


class Table(NamedTuple):
    study: str
    models: Sequence[str]  # or differences, "tars - sft". None: a row a seed, of figures "MODEL: FIGURE"
    figures: Mapping[str, str] | str  # {heading: figure}, or all that a regular expression matches


def over_lambda(*methods: str) -> list[str]:
    return [f"{method}-{share}" for method in methods for share in LAMBDAS]


DEMO, RIVALS = ("base", "sft", "rl-direct", "tars"), ("rpo", "sft8", "rl-direct")
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
PARTS = ("tars-0.1", "tars-0.5", "tars-0.9", "harmful-only", "plain-only", "heavy-0.5")
REASONED = "(format_rate|separation|decides|twins|capability)/.*|thought.*"
ATTACKED = {"GCG": GCG, "PAIR": PAIR} | {
    f"GCG, {name}": f"{GCG}_{name}" for name in ("close", "forged", "twin")
}
TABLES = {
    "main": Table("seeds", DEMO, BRIEF),  # README's
    "each-seed": Table("seeds", (), EACH),
    "kinds": Table("seeds", DEMO, "(controls|outcomes/gcg|compliance|task_score|format_rate)/.*"),
    "methods": Table("replicate", (*DEMO, "sft8", "rpo"), BRIEF | ATTACKED),
    "reasoning": Table("replicate", ("sft", "tars", "sft8", "rpo"), REASONED),
    "ablations": Table("ablations", PARTS, "(dsr|compliance|task_score)/.*|thought.*"),
    "over-steps": Table("ablations", ("tars-0.5", "harmful-only", "plain-only"), "training/.*"),
    "diversity": Table("ablations", ("sft", "sft-heavy"), "diversity/.*"),
    "ablated-areas": Table("ablations", ("tars", "heavy", "one-reward"), AREA),
    "frontier": Table("frontier", over_lambda("tars", *RIVALS), PLANE),
    "areas": Table("frontier", ("tars", *RIVALS, *(f"tars - {other}" for other in RIVALS)), AREA),
    "thought": Table("frontier", over_lambda("tars"), "thought.*"),
    "equal-tokens": Table("equal-tokens", over_lambda("tars", "rl-direct", "rl-direct-long"), PLANE),
    "attacks": Table("attacks", DEMO, "(dsr|worst_case)/.*"),
    "rainbow": Table("rainbow", ("without", "with", "with - without"), "dsr/.*|plane/task_score"),
}
FINDINGS = {  # of the paper; what is measured is among the claims of the studies
    "F1": "best frontier of safety and refusals; RL *and* reasoning are needed",
    "F2": "larger lambda: safer, more refusals, shorter thought",
    "F3": "more thought on ambiguous than on harmful prompts",
    "F4": "RL on harmful prompts alone: reward saturates, thought gets short, the ambiguous are refused",
    "F5": "heavy SFT before RL: less diverse samples, a narrower frontier",
    "F6": "ambiguous prompts cut refusals at equal safety",
    "F7": "two rewards reach further than one preference reward",
    "F8": "best under GCG and PAIR; SFT above RL without reasoning under GCG, below it under PAIR",
    "F9": "harmful and ambiguous prompts come apart inside",
    "F10": "SFT and DPO hardly react to lambda; the base's capabilities stay",
}


def pages(root: Path = ROOT) -> dict[Path, str]:
    """README and docs/results.md, with every table anew."""
    known = {path.stem: read_results(path) for path in sorted((root / "docs/results").glob("*.json"))}

    def anew(mark: re.Match) -> str:
        used, lines = findings(known) if mark[1] == "findings" else table(mark[1], known)
        commands = "; ".join(results["command"] for results in used)
        captions = [line for results in used for line in (caption(results), "")]
        return "\n".join([f"<!-- table {mark[1]}: {commands} -->", *captions, *lines, "<!-- end -->"])

    return {root / page: MARKED.sub(anew, (root / page).read_text(encoding="utf-8")) for page in PAGES}


def read_results(path: Path) -> Results:
    results = json.loads(path.read_text(encoding="utf-8"))
    return results | {"rows": {(row["model"], row["figure"]): row for row in results["rows"]}}


def caption(results: Results) -> str:
    seeds, many = results["seeds"], len(results["seeds"]) > 1
    which = f"seeds {seeds[0]} to {seeds[-1]}" if many else f"seed {seeds[0]}"
    what = "Mean [95 % interval, Student's t]; the lowest seed." if many else "One seed: no intervals."
    return f"`{results['command']}`, {which}, {results['date']}, {results['hardware']}. {what}"


def table(name: str, known: dict[str, Results]) -> tuple[list[Results], list[str]]:
    """(what it is made from, its lines). UserError if there is no such table, or no study to make it from."""
    if name not in TABLES:
        raise UserError(f"table {name}: unknown; allowed findings, {', '.join(TABLES)}")
    study, models, figures = TABLES[name]
    if study not in known:
        made = f"runs/{STUDIES[study].folder}/{study}.json"
        raise UserError(f"table {name}: no docs/results/{study}.json: run the study, then copy {made} there")
    rows, cells = known[study]["rows"], dict[Key, str]()
    if isinstance(figures, str):
        figures = {figure: figure for _, figure in rows if re.fullmatch(figures, figure)}
    for heading, figure in figures.items():
        for model in models:
            if (model, figure) in rows:
                cells[model, heading] = shown(rows[model, figure], model)
        if not models:
            model, _, figure = figure.partition(": ")
            for seed, value in zip(known[study]["seeds"], rows[model, figure]["each"], strict=True):
                cells[f"seed {seed}", heading] = shown({"mean": value, "n": 1}, model)
    return [known[study]], markdown(cells)


def findings(known: dict[str, Results]) -> tuple[list[Results], list[str]]:
    """(what it is made from, its lines): F1 to F10, what each claim gave here, and what follows from that."""
    cells, used = dict[Key, str](), dict[str, Results]()
    for finding, what in FINDINGS.items():
        measured, verdicts = list[str](), list[str]()
        for name, study in STUDIES.items():
            for claim in [claim for claim in study.claims if claim.finding == finding]:
                ci = known[name]["rows"].get(claim.key) if name in known else None
                verdicts.append(verdict(ci, claim.sign))
                if ci:
                    used[name] = known[name]
                    value = shown(ci, " - ").partition(";")[0]
                    measured.append(f"{claim.key[0]}, {claim.figure}: {value}, {verdicts[-1]}")
        whole = {("yes",): "reproduced", ("no",): "not reproduced"}.get(tuple(sorted(set(verdicts))), "open")
        cells[finding, "the paper finds"] = what
        cells[finding, "measured here"] = "; ".join(measured) or "not run"
        cells[finding, "verdict"] = "in part" if "yes" in verdicts and whole == "open" else whole
    return list(used.values()), markdown(cells)


def verdict(ci: Interval | None, sign: str) -> str:
    """Whether the interval of a difference bears out that it is > 0, < 0 or = 0: yes, no, or open.

    >>> [verdict({"low": 0.1, "high": 0.3}, sign) for sign in "><="]
    ['yes', 'no', 'no']
    >>> [verdict({"low": -0.04, "high": 0.05}, sign) for sign in "><="]
    ['open', 'open', 'yes']
    """
    if not ci or ci["low"] is None:
        return "open"
    low, high = ci["low"], ci["high"]
    above, below, alike = low > 0, high < 0, max(-low, high) <= ALIKE
    yes, no = {">": (above, below), "<": (below, above), "=": (alike, low > ALIKE or high < -ALIKE)}[sign]
    return "yes" if yes else "no" if no else "open"


def shown(ci: Interval, model: str) -> str:
    """0.83 [0.71, 0.95]; 0.77: mean, interval, lowest seed; of one its value. A difference has a sign."""
    sign = "+" if " - " in model else ""
    digits = 0 if abs(ci["mean"]) > 100 else 1 if abs(ci["mean"]) > 2 else 2
    numbers = [ci["mean"], ci["low"], ci["high"], min(ci["each"])] if ci["n"] > 1 else [ci["mean"]]
    mean, *rest = (f"{round(x, digits) + 0.0:{sign},.{digits}f}" for x in numbers)  # + 0.0: no -0.00
    return f"{mean} [{rest[0]}, {rest[1]}]; {rest[2]}" if rest else mean


def markdown(cells: dict[Key, str]) -> list[str]:
    """A table of models by figures, the longer side down."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if len(columns) > len(rows):
        rows, columns, cells = columns, rows, {key[::-1]: cell for key, cell in cells.items()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get((row, column), "-") for column in columns)] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]
