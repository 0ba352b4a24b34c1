"""What the report is made of: sections and tables as data, and how each table is filled from results.json.

Cells and texts are plain: those who render them (`lib/report/md.py`, `lib/report/html.py`) escape all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lib.metrics import SETS, bootstrap
from lib.report.figures import is_number, keys_of, number, show

TITLE = "Attack and evaluation"
CATEGORIES = 40  # rows of a table by category
PLANE = {
    "plain_or": "DSR, plain or attacked, mean over attacks",
    "dsr": "DSR, mean over attacks",
    "task_score": "task score",
}
WORST = {
    "gcg": "worst case of GCG and its variants",
    "shared": "worst case of the attacks that all models met",
    "all": "worst case of all that it met",
}
COSTS = {
    "access": "needs",
    "behaviours": "behaviours",
    "queries": "queries",
    "forward_tokens": "tokens forward",
    "backward_tokens": "tokens backward",
    "attacker_tokens": "attacker's tokens",
    "empty": "attacker failed",
    "did_not_survive": "lost in the round trip",
    "loss_before": "loss before",
    "loss_after": "loss after",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Table:
    """Cells are plain text. `marked`: (row, column) of those to highlight."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()

    def numeric(self) -> list[bool]:
        """Of each column, whether all its cells are numbers."""
        return [all(map(is_number, column)) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Section:
    """`figure`: the name of a picture of `draw_figures`. `code`: a command line."""

    title: str
    text: str
    tables: Sequence[Table]
    figure: str = ""
    code: str = ""


def by_key(caption: str, title: str, figure: str, models: dict, names: dict[str, str] | None = None) -> Table:
    """One row a key of `figure` (such as an attack), one column a model."""
    found = [m.get(figure) or {} for m in models.values()]
    rows = [
        [(names or {}).get(key, key), *(show(cis.get(key)) for cis in found)]
        for key in keys_of(models, figure)
    ]
    return Table(caption, [title, *models], rows)


def model_table(results: dict) -> Table:
    places = dict(text.partition("=")[::2] for text in results["config"].get("models", []))
    seconds = results.get("seconds", {})
    rows = [
        [name, "yes" if m.get("reasoning") else "no", places.get(name, "-"), number(seconds.get(name))]
        for name, m in results["models"].items()
    ]
    return Table("Models", ["model", "reasons first", "checkpoint", "seconds (this run)"], rows)


def prompt_table(lines: Sequence[dict]) -> Table:
    ids: dict[str, list[str]] = {}
    for line in lines:
        ids.setdefault(line["set"], []).append(line["id"])
    rows = [[name, number(len(set(found))), number(len(found))] for name, found in ids.items()]
    return Table("Prompts, and completions of all models", ["set", "prompts", "completions"], rows)


def defence_table(models: dict) -> Table:
    attacks, worst = by_key("", "", "dsr", models), by_key("", "", "worst_case", models, WORST)
    rows = [*attacks.rows, *worst.rows]
    marked = frozenset(
        (row, column) for row in range(len(attacks.rows), len(rows)) for column in range(len(models) + 1)
    )
    return Table("Share of behaviours defended", ["attack", *models], rows, marked)


def outcome_table(models: dict) -> Table:
    """Of each attack, and each model, the three ends that a request may come to."""
    rows = [
        [attack, name, *(show(found[end]) for end in ("refused", "useless", "leaked"))]
        for attack in keys_of(models, "outcomes")
        for name, m in models.items()
        if (found := (m.get("outcomes") or {}).get(attack))
    ]
    return Table("Shares of the requests", ["attack", "model", "refused", "useless", "leaked"], rows)


def count_table(caption: str, figure: str, models: dict) -> Table:
    counts = [m.get(figure) or {} for m in models.values()]
    rows = [[key, *(number(found.get(key, 0)) for found in counts)] for key in keys_of(models, figure)]
    return Table(caption, ["set", *models], rows)


def budget_table(models: dict) -> Table:
    rows = []
    for attack in keys_of(models, "dsr_by_budget"):
        curves = [dict((m.get("dsr_by_budget") or {}).get(attack, [])) for m in models.values()]
        steps = sorted({step for curve in curves for step in curve})
        rows += [[attack, number(step), *(show(curve.get(step)) for curve in curves)] for step in steps]
    return Table("DSR after so many steps or tries", ["attack", "budget", *models], rows)


def difference_table(differences: Sequence[dict]) -> Table:
    """One row a figure, those of one kind ("DSR, gcg" and "DSR, pair") together; one column a pair of models."""
    cis = {(d["figure"], f"{d['a']} - {d['b']}"): d["ci"] for d in differences}
    figures, pairs = (list(dict.fromkeys(key[k] for key in cis)) for k in (0, 1))
    kinds = [figure.partition(",")[0] for figure in figures]
    figures.sort(key=lambda figure: kinds.index(figure.partition(",")[0]))
    rows = [[figure, *(show(cis.get((figure, pair)), "+") for pair in pairs)] for figure in figures]
    clear = [key for key, ci in cis.items() if ci["low"] > 0 or ci["high"] < 0]
    marked = frozenset((figures.index(figure), pairs.index(pair) + 1) for figure, pair in clear)
    return Table("Paired differences, the first model minus the second", ["figure", *pairs], rows, marked)


def category_table(lines: Sequence[dict], part: str, names: Sequence[str], seed: int) -> Table:
    """Tokens of the reasoning, or of the answer, by category of prompt (paper, Table 3): the CATEGORIES with most prompts."""
    groups: dict[str, dict[str, list[int]]] = {}
    for x in lines:
        if x["set"] in SETS and (part == "answer" or x["closed"]):
            groups.setdefault(f"{x['set']}: {x['category']}", {}).setdefault(x["model"], []).append(
                x[f"{part}_tokens"]
            )
    kept = sorted(groups, key=lambda key: -sum(map(len, groups[key].values())))[:CATEGORIES]
    rows = [
        [key, *(show(bootstrap(g[name], seed) if name in g else None) for name in names)]
        for key in kept
        if (g := groups[key])
    ]
    return Table(
        f"{part.capitalize()} tokens by category (paper, Table 3)", ["set and category", *names], sorted(rows)
    )


def format_table(models: dict) -> Table:
    rows = [
        [attack, name, *(show(found.get(key)) for key in ("closed", "dsr_closed", "dsr_open"))]
        for attack in keys_of(models, "under_attack")
        for name, m in models.items()
        if (found := (m.get("under_attack") or {}).get(attack))
    ]
    return Table(
        "Format under attack (paper, Table 4)",
        ["attack", "model", "closed", "DSR, closed", "DSR, not closed"],
        rows,
    )


def separation_table(models: dict) -> Table:
    rows = [
        [name, groups, number(s["margin"]), number(s["slack"]), show(s["accuracy"]), number(s["n"])]
        for name, m in models.items()
        for groups, s in m.get("separation", {}).items()
    ]
    return Table(
        "Separation (paper, Figure 4)", ["model", "groups", "margin", "slack", "accuracy", "prompts"], rows
    )


def cost_table(models: dict) -> Table:
    attacks = keys_of(models, "attacks")
    found = [
        (a, name, cost)
        for a in attacks
        for name, m in models.items()
        if (cost := (m.get("attacks") or {}).get(a))
    ]
    keys = [key for key in COSTS if any(key in cost for _, _, cost in found)]
    rows = [[attack, name, *(number(cost.get(key)) for key in keys)] for attack, name, cost in found]
    return Table("Access and costs", ["attack", "model", *(COSTS[key] for key in keys)], rows)


def setting_table(config: dict) -> Table:
    rows = [
        [key, " ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in config.items()
    ]
    return Table("Settings, inputs and versions", ["setting", "value"], rows)
