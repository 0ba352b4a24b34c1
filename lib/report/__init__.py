"""Room: the report of stage 4, how far apart a model holds two groups of prompts, and learning curves.

    write_report(out, results, completions)    report.html, report.md and figures: what stage 4 measured
    separations(victim, groups, safe)          inside a model: harmful against safe prompts (paper, Figure 4)
    served_by_prompt, differences              models in pairs, on the same prompts
    draw_curves(metrics_path, png_path)        what stages 2 and 3 have logged, as small panels
    save(draw, data, path)                     any figure, where matplotlib is installed

Skip it at first: the numbers come from lib/metrics.py, and here they are only shown: sections.py is what the
report says, page.html how it looks, figures.py what is drawn, where matplotlib is installed. separation.py is
worth a visit: a support vector machine from scratch. Tests: tests/test_report.py, tests/test_separation.py.
"""

from __future__ import annotations

import base64
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from lib.metrics import BENIGN, bootstrap, deciding
from lib.report.figures import draw_curves, draw_figures, save
from lib.report.sections import sections, show
from lib.report.separation import separations
from lib.run.files import write_text
from lib.run.text import visible

__all__ = ["differences", "draw_curves", "save", "separations", "served_by_prompt", "write_report"]
PROMPTS = 500  # of each set, in a page


def write_report(out: Path, results: dict, completions: Sequence[dict]) -> None:
    """Write report.html and report.md to `out`, and the figures as PNG files where matplotlib is installed.

    `results` is the content of results.json, `completions` the lines of completions.jsonl. What `results`
    lacks is left out. The learning curves are those in the models' folders.
    """
    figures = draw_figures(results, out)
    for name, folder in (text.split("=", 1) for text in results["config"]["models"]):
        if (file := Path(folder) / "curves.png").is_file():
            figures.append(f"curves_{name}")
            shutil.copyfile(file, out / f"curves_{name}.png")
    found = sections(results, completions, figures)
    write_text(out / "report.md", as_text(found))
    prompts = by_prompt(completions, results["config"]["harm_threshold"])
    pictures = {name: base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in figures}
    write_text(out / "report.html", as_page(sections=found, prompts=prompts, pictures=pictures))


def as_text(sections: Sequence[dict]) -> str:
    """report.md. The figures are files beside it."""
    blocks = ["# Attack and evaluation"]
    for section in sections:
        blocks += [f"## {section['title']}", section["text"].replace("<", "&lt;")]
        blocks += [f"![{name}]({name}.png)" for name in section["figures"]]
        blocks += map(table_as_text, section["tables"])
    return "\n\n".join(filter(None, blocks)) + "\n"


def table_as_text(table: dict) -> str:
    """Columns lined up, behind four spaces: markdown shows that as it stands, whatever is in it."""
    rows = [[" ".join(visible(text).split()) for text in row] for row in (table["head"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(f"    {line}" for line in (f"{table['caption']}:", *lines))


def as_page(**values: object) -> str:
    """report.html, page.html with `values`: one file that loads nothing, and prints.

    Names and completions are text that nobody has vouched for: `visible` names what hides or reorders text,
    and the template escapes all that it is given.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: visible(str(value))
    environment.filters["show"] = show
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def by_prompt(lines: Sequence[dict], threshold: float) -> list[list[dict]]:
    """Of each set the first PROMPTS prompts, and of these, the models side by side, the lines that decide."""
    found: dict[str, dict[str, list[dict]]] = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        for name in dict.fromkeys(line["set"] for line in own):
            for line in deciding(own, name, threshold):
                line = {**line, "verdict": verdict(line, threshold)}
                found.setdefault(name, {}).setdefault(line["id"], []).append(line)
    return [models for prompts in found.values() for models in list(prompts.values())[:PROMPTS]]


def verdict(line: dict, threshold: float) -> str:
    if line["kind"] != "harmful":
        return {"none": "served", None: "unknown"}.get(line["refusal"], "refused")
    if line["harm"] is None:
        return "unknown"
    return "broken" if line["harm"] >= threshold else "defended"


# ---- two models on the same prompts, for results.json ------------------------------------------------------


def served_by_prompt(lines: Sequence[dict]) -> dict[str, dict[str, float]]:
    """{figure: {prompt's id: value}} of one model, of requests that deserve an answer."""
    values: dict[str, dict[str, float]] = {}
    for kind in BENIGN:
        group = [x for x in lines if x["set"] == kind]
        labelled = [x for x in group if x["refusal"] is not None]
        values[f"compliance, {kind}"] = {x["id"]: float(x["refusal"] == "none") for x in labelled}
        values[f"task score, {kind}"] = {x["id"]: x["task"] for x in group if x["task"] is not None}
    return values


def differences(values: dict[str, dict[str, dict[str, float]]], seed: int) -> list[dict]:
    """Paired differences a - b of every two models, over the prompts that both met: figure, a, b, ci.

    values: {model: {figure: {prompt's id: value}}}. ci: also on how many prompts they differ.
    """
    found = []
    for a, b in itertools.combinations(values, 2):
        for figure in [f for f in values[a] if f in values[b]]:
            mine, theirs = values[a][figure], values[b][figure]
            if gaps := [mine[i] - theirs[i] for i in mine if i in theirs]:
                ci = bootstrap(gaps, seed) | {"differ": sum(gap != 0 for gap in gaps)}
                found.append({"figure": figure, "a": a, "b": b, "ci": ci})
    return found
