"""The tables of README and docs/results.md, from docs/results/STUDY.json: none has a number by hand.

`python -m lib.compare.study --write-docs` writes table NAME between the two lines

    <!-- table NAME: the command that gave its numbers -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lib import UserError
from lib.compare.studies import FINDINGS, STUDIES, TABLES, Key
from lib.metrics import Interval

Results = dict[str, Any]  # of a study: command, seeds, date, hardware; rows: {(model, figure): interval}
ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/results.md")
MARKED = re.compile(r"<!-- table ([\w-]+):.*? -->\n.*?<!-- end -->", re.S)
ALIKE = 0.05  # two figures are equal for us if the interval of their difference lies within


def pages(root: Path = ROOT) -> dict[Path, str]:
    """README and docs/results.md, with every table anew."""
    files = sorted((root / "docs/results").glob("*.json"))
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    for results in kept.values():
        results["rows"] = {(row["model"], row["figure"]): row for row in results["rows"]}

    def anew(mark: re.Match) -> str:
        commands, lines = findings(kept) if mark[1] == "findings" else table(mark[1], kept)
        return "\n".join([f"<!-- table {mark[1]}: {commands} -->", *lines, "<!-- end -->"])

    return {root / page: MARKED.sub(anew, (root / page).read_text(encoding="utf-8")) for page in PAGES}


def caption(results: Results, what: str = "Mean [95 % interval, Student's t]; the lowest seed.") -> str:
    first, last = results["seeds"][0], results["seeds"][-1]
    seeds = f"seeds {first} to {last}" if first < last else f"seed {first}, which has no interval"
    return f"`{results['command']}`, {seeds}, {results['date']}, {results['hardware']}. {what}".strip()


def table(name: str, kept: dict[str, Results]) -> tuple[str, list[str]]:
    """(the command that gave its numbers, its lines). UserError where there is no such table, or no study."""
    if name not in TABLES:
        raise UserError(f"table {name}: unknown; allowed findings, {', '.join(TABLES)}")
    study, models, figures = TABLES[name]
    if study not in kept:
        made = f"runs/{STUDIES[study].folder}/{study}.json"
        raise UserError(f"table {name}: no docs/results/{study}.json: run the study, then copy {made} there")
    rows, cells = kept[study]["rows"], dict[Key, str]()
    if isinstance(figures, str):
        figures = {figure: figure for _, figure in rows if re.fullmatch(figures, figure)}
    for heading, figure in figures.items():
        for model in [model for model in models if (model, figure) in rows]:
            cells[model, heading] = shown(rows[model, figure], model)
        model, _, figure = figure.partition(": ")
        if not models and (model, figure) in rows:
            for seed, value in zip(kept[study]["seeds"], rows[model, figure]["each"], strict=True):
                cells[f"seed {seed}", heading] = shown({"mean": value, "n": 1}, model)
    about = caption(kept[study]) if models else caption(kept[study], "")
    return kept[study]["command"], [about, "", *markdown(cells)]


UNKNOWN = "not measured"


def findings(kept: dict[str, Results]) -> tuple[str, list[str]]:
    """Likewise F1 to F10: each claim of the studies, and what follows from all of a finding's.

    A claim of two studies is that of the first in STUDIES which is kept.
    """
    claims = [(name, claim) for name in STUDIES for claim in STUDIES[name].claims]
    lines, used = ["|  | the paper finds | measured here | as claimed? |", "| --- | --- | --- | --- |"], {}
    for finding, what in FINDINGS.items():
        measured = dict[Key, tuple[str, str]]()
        for name, claim in [(name, claim) for name, claim in claims if claim.finding == finding]:
            measured.setdefault(claim.key, (f"{claim.sign} 0 |", UNKNOWN))
            ci = kept[name]["rows"].get(claim.key) if name in kept else None
            if ci and measured[claim.key][1] == UNKNOWN:
                used[name], value = kept[name], shown(ci, " - ").partition(";")[0]
                measured[claim.key] = f"{claim.sign} 0 | {value}", verdict(ci, claim.sign)
        lines.append(f"| {finding} | {what} | | **{overall({found for _, found in measured.values()})}** |")
        for (ours, figure), (value, found) in measured.items():
            lines.append(f"| | {ours}: {figure} {value} | {found} |")
    how = f"Mean differences [95 % interval, Student's t], paired by seed; = 0: within {ALIKE} of it."
    captions = [line for results in used.values() for line in (caption(results, ""), "")]
    return "; ".join(results["command"] for results in used.values()), [*captions, how, "", *lines]


def overall(verdicts: set[str]) -> str:
    """Of a finding, from those of its claims."""
    if verdicts == {"yes"}:
        return "reproduced"
    if "yes" in verdicts:
        return "in part"
    if "no" in verdicts:
        return "not reproduced"
    return "open" if "open" in verdicts else UNKNOWN


def verdict(ci: Interval, sign: str) -> str:
    """Whether the interval of a difference bears out that it is > 0, < 0 or = 0: yes, no, or open.

    >>> [verdict({"low": 0.1, "high": 0.3}, sign) for sign in "><="]
    ['yes', 'no', 'no']
    >>> [verdict({"low": -0.04, "high": 0.05}, sign) for sign in "><="]
    ['open', 'open', 'yes']
    """
    low, high = ci["low"], ci["high"]
    if low is None:  # of one seed
        return "open"
    yes = {">": low > 0, "<": high < 0, "=": max(-low, high) <= ALIKE}
    no = {">": high < 0, "<": low > 0, "=": low > ALIKE or high < -ALIKE}
    return "yes" if yes[sign] else "no" if no[sign] else "open"


def shown(ci: Interval, model: str) -> str:
    """0.83 [0.71, 0.95]; 0.77: mean, interval, lowest seed; of one its value. A difference has a sign."""
    sign = "+" if " - " in model else ""
    digits = 0 if abs(ci["mean"]) > 100 else 1 if abs(ci["mean"]) > 2 else 2
    numbers = [ci["mean"], ci["low"], ci["high"], min(ci["each"])] if ci["n"] > 1 else [ci["mean"]]
    mean, *rest = (f"{round(x, digits) + 0.0:{sign},.{digits}f}" for x in numbers)  # + 0.0: no -0.00
    return f"{mean} [{rest[0]}, {rest[1]}]; {rest[2]}" if rest else mean


def by_model(found: dict[str, dict[str, Interval]]) -> str:
    """Of one run, figures by models: {model: {figure: ci}}.

    >>> print(by_model({"tars": {"dsr": {"mean": 0.825, "low": 0.7, "high": 0.95, "n": 40}}}))
    |  | tars |
    | --- | --- |
    | dsr | 0.82 [0.70, 0.95] |
    """
    text = "{mean:.2f} [{low:.2f}, {high:.2f}]"
    cells = {(key, name): text.format(**ci) for name, own in found.items() for key, ci in own.items()}
    return "\n".join(markdown(cells))


def markdown(cells: dict[Key, str]) -> list[str]:
    """A table of models by figures, the longer side down."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if len(columns) > len(rows):
        rows, columns, cells = columns, rows, {key[::-1]: cell for key, cell in cells.items()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get((row, column), "-") for column in columns)] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]
