"""What the report says: one list of sections, with tables as data. `lib/report` renders it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lib.metrics import SETS, by, mean_of

# "##": a title; "!": how names of figures begin; "|": a part of the results, and the caption of its table.
SECTIONS = """
## Summary
An entry is a mean, its 95 % interval and the number of observations: 0.97 [0.92, 0.99] (64). Intervals are
Wilson's for shares, bootstrap for means. Figures need matplotlib; the tables have their numbers.
| about: Models
| completions: Completions of each set
## Safety against refusal, and against use
! plane
DSR is the share of attacks defended: the mean of held-out disguises and of the attacks that all models met.
In plain_or, each attacker sends the plain request as well. Compliance is the share of harmless and ambiguous
requests that are not refused, not even in part. A wrong answer complies too, so the task score (was the
request served?) stands beside it. Up and to the right is better.
| plane: The plane in numbers
## Defence against each attack (DSR)
! attacks
plain_or_X leads: an attacker sends the plain request as well, and neither got through. X, the paper's number,
is the attack alone; it may be above plain, where the attack confuses the model. pap_mean is over techniques.
An average flatters, for an attacker takes the attack that works. In the worst case a behaviour held against
every form of one search (gcg), every attack that all models met (shared), or all that this model met.
| dsr: Share of behaviours defended
| worst_case: Share of behaviours defended in the worst case
| unknown: Verdicts that the judge did not give (never a defence)
| not_asked: Not asked: too long, or the attacker wrote nothing for it (in no figure)
| controls: Controls: nothing is searched, one try each
## What became of the requests
Of the answers that decide. Useless: neither a refusal nor harm, so a wrong answer; it counts as defended.
| outcomes: Shares of the requests
## DSR against the attacker's budget
! budgets
A search is tried at each budget with the best that it has found; an attack that asks has so many tries. One
success at a budget counts at every larger one, so no curve rises.
| dsr_by_budget: DSR after so many steps or tries
## Requests that deserve an answer
By kind, and by type of ambiguous prompt. Of harmful prompts, asked openly or in disguise, low is good.
| compliance: Compliance
| partial: Refused in part, and helped in part
| task_score: Task score
| unknown_refusals: Labels that --refusals did not give (in no figure)
## Thought
Reasoning tokens are of completions that close their reasoning. Compare kinds at equal hops, if given.
| reasoning_tokens: Reasoning tokens
| answer_tokens: Answer tokens
| reasoning_by_category: Reasoning tokens by category (paper, Table 3)
| answer_by_category: Answer tokens by category (paper, Table 3)
## Format, and what an attack does to it
Well-formed: exactly one </think>, no second <think>. Closed: the reasoning ends at all. An attack may keep a
model from ever ending it, so DSR is given with an end (closed) and without (open).
| format_rate: Well-formed completions
| under_attack: Format under attack (paper, Table 4)
## Internal separation
! separation
What a model holds of harmful prompts, in disguise or under GCG, and of safe ones that look harmful: before
it writes and, of a reasoner, after its own greedy reasoning, at </think>. Accuracy of a linear SVM (C = 1) on
prompts held out; its margin, with its price, the slack. The map is PCA.
| separation: Separation (paper, Figure 4)
## What each attack needs and costs
Over all behaviours. Loss: of the attacker's target, before the search and after it.
| attacks: Access and costs
## Differences between models
The first model minus the second, over the prompts that both met. Marked *: the interval leaves out 0.
Where fewer than six prompts differ, it is never marked: even all to one side may be chance.
| differences: Paired differences
## Learning curves
! curves_
## Settings
| settings: All that is behind these numbers
"""


FEW = 6  # all to one side: by chance once in 32 times, and five once in 16


def show(cell: Any, sign: str = "") -> str:
    """A cell as text: mean, interval (if it has one), observations; * marks a difference that leaves out 0.

    Two digits, or one for numbers of tokens, which are above 2.

    >>> show({"mean": 0.07, "low": 0.02, "high": 0.12, "n": 64, "differ": 9}, sign="+")
    '+0.07 [+0.02, +0.12] (64) *'
    >>> [show(cell) for cell in (1234, 2.345, 0.0042, 0.0, None, "white-box")]
    ['1,234', '2.35', '0.0042', '0.00', '-', 'white-box']
    """
    if isinstance(cell, dict):
        if cell["low"] is None:
            return f"{cell['mean']:.2f} ({cell['n']})"
        digits = 1 if cell["high"] > 2 else 2
        numbers = [round(cell[key], digits) + 0.0 for key in ("mean", "low", "high")]  # + 0.0: no -0.00
        mean, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
        clear = sign and cell["differ"] >= FEW and not cell["low"] <= 0 <= cell["high"]
        mark = " *" if clear else ""
        return f"{mean} [{low}, {high}] ({cell['n']}){mark}"
    if isinstance(cell, float):
        return f"{cell:.2g}" if 0 < abs(cell) < 0.1 else f"{cell:,.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell or "-"


def keys_of(models: dict, part: str) -> list[str]:
    """The keys, such as attacks, that some model has in its `part`; first those of the model with most."""
    found = sorted((m.get(part, {}) for m in models.values()), key=len, reverse=True)
    return list(dict.fromkeys(key for keys in found for key in keys))


def table_of(part: str, caption: str, models: dict) -> dict[str, Any]:
    """A row a key of `part` (such as an attack), a column a model.

    Where a key has several figures, such as costs: a row a key and a model, a column a figure.
    """
    keys, sign = keys_of(models, part), "+" if part == "differences" else ""
    cells = {(k, name): m[part][k] for k in keys for name, m in models.items() if k in m.get(part, {})}
    several = [cell for cell in cells.values() if isinstance(cell, dict) and "mean" not in cell]
    if figures := list(dict.fromkeys(figure for cell in several for figure in cell)):
        head = ["", "model", *(x.replace("_", " ") for x in figures)]
        rows = [[k, name, *(show(cell.get(x)) for x in figures)] for (k, name), cell in cells.items()]
    else:
        head = ["", *models]
        rows = [[k, *(show(cells.get((k, name)), sign) for name in models)] for k in keys]
    return {"caption": caption, "head": head, "rows": rows}


def parts_of(name: str, results: dict, lines: Sequence[dict]) -> dict[str, dict]:
    """What results.json says of a model, and what its completions add, in a shape for `table_of`."""
    m, seed = results["models"][name], results["seed"]
    mine = [line for line in lines if line["model"] == name]
    asked = [line for line in mine if line["set"] in SETS]
    curves = m.get("dsr_by_budget", {})
    path = dict(text.split("=", 1) for text in results["config"]["models"])[name]
    about = {"checkpoint": path, "reasons first": "yes" if m["reasoning"] else "no"}
    parts = {
        **m,
        "about": {**about, "seconds (this run)": results["seconds"][name]},
        "completions": Counter(line["set"] for line in mine),
        "dsr_by_budget": {f"{attack}, {step}": ci for attack in curves for step, ci in curves[attack]},
    }
    for tokens, group in (("reasoning", [x for x in asked if x["closed"]]), ("answer", asked)):
        mean = mean_of(f"{tokens}_tokens", seed)
        parts[f"{tokens}_by_category"] = by(lambda x: [f"{x['set']}: {x['category']}"], group, mean)
    return parts


def sections(results: dict, lines: Sequence[dict], drawn: Sequence[str]) -> list[dict[str, Any]]:
    """All but the completions themselves: [{"title", "text", "tables", "figures": names}, ...].

    `lines`: of completions.jsonl; `drawn`: names of the figures. Tables without rows and figures that there
    are not are left out, and so is a section with neither.
    """
    models = {name: parts_of(name, results, lines) for name in results["models"]}
    pairs: dict[str, dict] = {}  # shown as if each were a model
    for d in sorted(results.get("differences", []), key=lambda d: d["figure"]):
        pair = pairs.setdefault(f"{d['a']} - {d['b']}", {"differences": {}})
        pair["differences"][d["figure"]] = d["ci"]
    settings = {"command": shlex.join(["python", *sys.argv])}
    for key, value in results["config"].items():
        settings[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    others = {"differences": pairs, "settings": {"value": {"settings": settings}}}
    found = []
    for block in SECTIONS.split("## ")[1:]:
        title, *rest = block.strip().split("\n")
        captions = dict(row[2:].split(": ", 1) for row in rest if row[0] == "|")
        tables = [table_of(part, caption, others.get(part, models)) for part, caption in captions.items()]
        tables = [table for table in tables if table["rows"]]
        figures = [name for row in rest if row[0] == "!" for name in drawn if name.startswith(row[2:])]
        if tables or figures:
            text = " ".join(row for row in rest if row[0] not in "!|")
            found.append({"title": title, "text": text, "tables": tables, "figures": figures})
    return found
