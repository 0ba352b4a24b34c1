"""What the report says: one list of sections, with tables as data. `lib/report/page.py` renders it.

sections.txt has it all but the settings: "##" and a title, "!" and a figure, a text, and for each table "|",
the part of a model's results that it shows, and its caption. A cell is as in results.json: a mean with its
interval, {"mean", "low", "high", "n"}, a number, a text, or None.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.metrics import SETS, Interval, bootstrap

CATEGORIES = 40  # rows of a table by category


@dataclass
class Table:
    """The first cell of a row is its head. `sign`: "+" in a table of differences."""

    caption: str
    head: list[str]
    rows: list[list[Any]]
    sign: str = ""


@dataclass
class Section:
    """`figures`: names of pictures, such as "plane" for plane.png."""

    title: str
    text: str
    tables: list[Table]
    figures: list[str]


def show(cell: Any, sign: str = "") -> str:
    """A cell as text: mean, interval and observations; a difference is marked if its interval leaves out 0.

    Two digits, or one for numbers of tokens, which are above 2.

    >>> show({"mean": 0.07, "low": 0.02, "high": 0.12, "n": 64}, sign="+")
    '+0.07 [+0.02, +0.12] (64) *'
    >>> [show(cell) for cell in (1234, 2.345, 0.0042, 0.0, None, "white-box")]
    ['1,234', '2.35', '0.0042', '0.00', '-', 'white-box']
    """
    if isinstance(cell, dict):
        digits = 1 if cell["high"] > 2 else 2
        numbers = [round(cell[key], digits) + 0.0 for key in ("mean", "low", "high")]  # + 0.0: no -0.00
        mean, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
        mark = " *" if sign and not cell["low"] <= 0 <= cell["high"] else ""
        return f"{mean} [{low}, {high}] ({cell['n']}){mark}"
    if isinstance(cell, float):
        return f"{cell:.2g}" if 0 < abs(cell) < 0.1 else f"{cell:,.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell or "-"


def keys_of(models: dict, part: str) -> list[str]:
    """The keys, such as attacks, that some model has in its `part`; first those of the model with most.

    >>> keys_of({"a": {"dsr": {"direct": 0.5}}, "b": {"dsr": {"gcg": 0.1, "direct": 0.7}}}, "dsr")
    ['gcg', 'direct']
    """
    found = sorted((m.get(part, {}) for m in models.values()), key=len, reverse=True)
    return list(dict.fromkeys(key for keys in found for key in keys))


def table_of(part: str, caption: str, models: dict) -> Table:
    """A row a key of `part` (such as an attack), a column a model.

    Where a key has several figures, such as costs: a row a key and a model, a column a figure.
    """
    keys = keys_of(models, part)
    cells = {
        (key, name): m[part][key] for key in keys for name, m in models.items() if key in m.get(part, {})
    }
    several = [cell for cell in cells.values() if isinstance(cell, dict) and "mean" not in cell]
    if several:
        figures = list(dict.fromkeys(figure for cell in several for figure in cell if figure != "points"))
        rows = [[key, name, *map(cell.get, figures)] for (key, name), cell in cells.items()]
        return Table(caption, ["", "model", *(figure.replace("_", " ") for figure in figures)], rows)
    rows = [[key, *(cells.get((key, name)) for name in models)] for key in keys]
    return Table(caption, ["", *models], rows, "+" if part == "differences" else "")


def by_category(lines: Sequence[dict], part: str, seed: int) -> dict[str, Interval]:
    """{category: tokens of the "reasoning" or "answer"}; only the CATEGORIES with most completions."""
    tokens: dict[str, list[int]] = {}
    for x in lines:
        if x["set"] in SETS and (part == "answer" or x["closed"]):
            tokens.setdefault(f"{x['set']}: {x['category']}", []).append(x[f"{part}_tokens"])
    most = sorted(tokens, key=lambda key: -len(tokens[key]))[:CATEGORIES]
    return {key: bootstrap(tokens[key], seed) for key in sorted(most)}


def parts_of(name: str, results: dict, lines: Sequence[dict]) -> dict[str, dict]:
    """What results.json says of a model, and what its completions add, in a shape for `table_of`."""
    m, seconds = results["models"][name], results["seconds"][name]
    paths = dict(text.split("=", 1) for text in results["config"]["models"])
    reasons = "yes" if m["reasoning"] else "no"
    curves = m.get("dsr_by_budget", {})
    return {
        **m,
        "about": {"checkpoint": paths[name], "reasons first": reasons, "seconds (this run)": seconds},
        "completions": Counter(line["set"] for line in lines),
        "dsr_by_budget": {f"{attack}, {step}": ci for attack in curves for step, ci in curves[attack]},
        "reasoning_by_category": by_category(lines, "reasoning", results["seed"]),
        "answer_by_category": by_category(lines, "answer", results["seed"]),
    }


def sections(results: dict, lines: Sequence[dict], drawn: Sequence[str]) -> list[Section]:
    """All but the completions themselves. `lines`: of completions.jsonl; `drawn`: names of the figures.

    Tables without rows and figures that there are not are left out, and so is a section with neither.
    """
    models = {}
    for name in results["models"]:
        models[name] = parts_of(name, results, [line for line in lines if line["model"] == name])
    pairs: dict[str, dict] = {}  # shown as if each were a model
    for d in sorted(results.get("differences", []), key=lambda d: d["figure"]):
        pair = pairs.setdefault(f"{d['a']} - {d['b']}", {"differences": {}})
        pair["differences"][d["figure"]] = d["ci"]
    found = []
    for block in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("## ")[1:]:
        title, *rest = block.strip().split("\n")
        tables = []
        for part, caption in (row[2:].split(": ", 1) for row in rest if row[0] == "|"):
            tables.append(table_of(part, caption, pairs if part == "differences" else models))
        text = " ".join(row for row in rest if row[0] not in "!|")
        found.append(Section(title, text, tables, [row[2:] for row in rest if row[0] == "!"]))
    found.append(Section("Learning curves", "", [], [name for name in drawn if name.startswith("curves_")]))
    rows = [["command", shlex.join(["python", *sys.argv])]]
    for key, value in results["config"].items():
        rows.append([key, " ".join(map(str, value)) if isinstance(value, list) else str(value)])
    table = Table("All that is behind these numbers", ["", "value"], rows)
    found.append(Section("Settings", "", [table], []))
    for section in found:
        section.tables = [table for table in section.tables if table.rows]
        section.figures = [name for name in section.figures if name in drawn]
    return [section for section in found if section.tables or section.figures]
