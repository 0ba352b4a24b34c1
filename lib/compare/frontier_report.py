"""From the runs of lib/compare/frontier.py to frontier.json, frontier.md and the figures.

A point is a method at a lambda (None for base and pi_SFT); its figures are means over seeds with Student's t interval:
{"mean", "low", "high", "n", "each": the value of every seed}. One seed has no interval: low and high are None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from lib import UserError
from lib.compare.replicate import Get, average, cell
from lib.metrics import Interval, student_t
from lib.report.figures import bars, label, legend, styles
from lib.run.files import read_jsonl, write_json, write_text

REFERENCES = {"base": "base", "pi_SFT": "sft"}  # point: its model's name in eval-references
Point = tuple[str, float | None]  # method, lambda
Rows = dict[Point, list[dict[str, float]]]  # for each seed, its figures
Figures = dict[str, Interval | None]
Areas = dict[str, dict[str, list[float]]]  # of each plane, for each method, one a seed
KINDS = ("harmful", "harmless", "ambiguous")


def refusal(kind: str) -> Get:
    return lambda results: 1 - cell("compliance", kind)(results)


ATTACKS = ("direct", "jailbreak", "plain_or_gcg")
FIGURES: dict[str, Get] = {
    "DSR": average(*(cell("dsr", attack) for attack in ATTACKS)),
    **{f"DSR {attack}": cell("dsr", attack) for attack in ATTACKS},
    "compliance": cell("plane", "compliance"),  # of harmless and ambiguous prompts
    "task score": cell("plane", "task_score"),
    **{f"refusal {kind}": refusal(kind) for kind in KINDS},
    **{f"reasoning tokens {kind}": cell("reasoning_tokens", kind) for kind in KINDS},
}
COLUMNS = (*FIGURES, "training tokens")

# ---- reading -----------------------------------------------------------------------------------------------


def training_tokens(run: Path) -> float:
    """Tokens of completions that a finished run of stage 2 or 3 has sampled, plus those that it has trained on.

    Prompts do not count. Stage 3 logs both as rates and seconds of each step; RPO trains on the pairs that are no ties.
    Stage 2 samples nothing and trains on `batch_size` traces an update; their mean length stands for each.
    """
    lines, total = read_jsonl(run / "metrics.jsonl"), 0.0
    if "seconds_train" in lines[0]:
        for x in lines:
            used = x["pairs"] / (x["pairs"] + x["tied_pairs"]) if "pairs" in x else 1.0
            total += (
                x["sample_tokens_per_s"] * x["seconds_sample"]
                + used * x["train_tokens_per_s"] * x["seconds_train"]
            )
        return float(round(total))
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    from lib.chat import encode_example  # here, because torch is slow to import
    from lib.run.hub import load_tokenizer  # here, because torch is slow to import

    tokenizer = load_tokenizer(str(run))
    traces = read_jsonl(Path(settings["data"]) / settings["traces"])
    reasons = settings["reasoning"]
    lengths = [
        sum(encode_example(tokenizer, t["prompt"], t["reasoning"] if reasons else None, t["answer"])[1])
        for t in traces
    ]
    return float(round(len(lines) * settings["batch_size"] * sum(lengths) / len(lengths)))


def read_rows(seeds: Sequence[Path], lambdas: Sequence[float], methods: Sequence[str]) -> Rows:
    """The figures of every point, a dict a seed; NaN where a model has none."""
    rows: Rows = {}
    for seed in seeds:

        @cache
        def models(name: str, seed: Path = seed) -> dict[str, dict]:
            return json.loads((seed / f"eval-{name}" / "results.json").read_text(encoding="utf-8"))["models"]

        for name, model in REFERENCES.items():
            row = {figure: get(models("references")[model]) for figure, get in FIGURES.items()}
            rows.setdefault((name, None), []).append(row | {"training tokens": math.nan})
        for method in methods:
            for share in lambdas:
                run = f"{method}-{share:g}"
                row = {figure: get(models(run)[run]) for figure, get in FIGURES.items()}
                rows.setdefault((method, share), []).append(
                    row | {"training tokens": training_tokens(seed / run)}
                )
    return rows


# ---- aggregating -------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Mean and interval over seeds; None if a seed has no such figure."""
    if any(map(math.isnan, values)):
        return None
    alone = {"mean": round(values[0], 4), "low": None, "high": None, "n": 1}
    return (student_t(values) if len(values) > 1 else alone) | {"each": [round(v, 4) for v in values]}


def dominated_area(points: Iterable[tuple[float, float]]) -> float:
    """Share of the unit square that some point dominates, being as good or better on both axes (hypervolume, origin 0).

    >>> dominated_area([(1.0, 0.5), (0.5, 1.0), (0.4, 0.4)])
    0.75
    """
    area = height = 0.0
    for x, y in sorted(points, reverse=True):  # from the right: a point adds the strip by which it is higher
        if y > height:
            area, height = area + x * (y - height), y
    return area


def by_method(rows: Rows) -> dict[str, list[Point]]:
    """The points of each method, by lambda."""
    found: dict[str, list[Point]] = {}
    for point in sorted(rows, key=lambda p: p[1] or 0.0):
        found.setdefault(point[0], []).append(point)
    return {method: found[method] for method in dict.fromkeys(method for method, _ in rows)}


HELP = {"frontier area": "task score", "frontier area, compliance": "compliance"}  # the other axis beside DSR


def areas(rows: Rows) -> Areas:
    """Frontier areas in the planes of DSR and task score, and of DSR and compliance (the paper's axis)."""
    seeds, curves = range(len(next(iter(rows.values())))), by_method(rows)
    at = lambda point, i, help_: (rows[point][i]["DSR"], rows[point][i][help_])  # noqa: E731
    return {
        name: {
            method: [dominated_area(at(p, i, help_) for p in points) for i in seeds]
            for method, points in curves.items()
        }
        for name, help_ in HELP.items()
    }


def differences(rows: Rows, area: Areas, ours: str = "tars") -> dict[str, Figures]:
    """`ours` minus each other method, {method: {figure: interval}}. Paired: by seed, and at equal lambda, then averaged over
    lambdas. A method without lambda is the same one at each."""
    curves, found = by_method(rows), {}
    for other in [m for m in curves if m != ours] if ours in curves else []:
        pairs = [(p, (other, p[1]) if (other, p[1]) in rows else (other, None)) for p in curves[ours]]
        found[other] = {
            figure: over_seeds(
                [
                    sum(rows[a][i][figure] - rows[b][i][figure] for a, b in pairs) / len(pairs)
                    for i in range(len(rows[pairs[0][0]]))
                ]
            )
            for figure in ("DSR", "compliance", "task score")
        }
        for name, of in area.items():
            found[other][name] = over_seeds([a - b for a, b in zip(of[ours], of[other], strict=True)])
    return found


# ---- writing -----------------------------------------------------------------------------------------------


def shown(ci: Interval | None, sign: str = "") -> str:
    """0.83 [0.71, 0.95]; tokens with fewer digits; without the brackets where there is no interval."""
    if ci is None:
        return "-"
    digits = 0 if abs(ci["mean"]) > 100 else 1 if abs(ci["mean"]) > 2 else 2
    mean, *bounds = (
        f"{round(ci[key], digits) + 0.0:{sign},.{digits}f}"
        for key in ("mean", "low", "high")
        if ci[key] is not None
    )
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)] + [""]


def report(
    points: list[dict], area: dict[str, Figures], gaps: dict[str, Figures], pictures: Iterable[str]
) -> str:
    """Markdown: every point, the areas, the differences."""
    n = points[0]["DSR"]["n"]
    many = f"Mean over {n} seeds [95 % interval, Student's t]"
    lines = [
        "# The safety-refusal frontier on the sandbox",
        "",
        f"{many if n > 1 else 'One seed: no intervals'}. DSR: mean of direct, jailbreak, plain or GCG. Compliance and task "
        "score: of harmless and ambiguous prompts. Training tokens: completion tokens sampled plus trained on, after the warm "
        "start.",
        "",
    ]
    lines += [line for name in pictures for line in (f"![{CAPTIONS[name]}]({name}.png)", "")]
    cells = (
        [p["method"], "-" if p["lambda"] is None else f"{p['lambda']:g}", *(shown(p[c]) for c in COLUMNS)]
        for p in points
    )
    lines += table(["method", "lambda", *COLUMNS], cells)
    lines += [
        "## Frontier area",
        "",
        "Share of the unit square that a method's points dominate. One side is DSR, the other:",
        "",
    ]
    cells = ([method, *(shown(area[name][method]) for name in HELP)] for method in area["frontier area"])
    lines += table(["method", *HELP.values()], cells)
    if gaps:
        lines += [
            "## tars minus each other",
            "",
            "Paired by seed, at equal lambda, averaged over lambdas.",
            "",
        ]
        names = list(next(iter(gaps.values())))
        lines += table(
            ["tars minus", *names], [[m, *(shown(ci, "+") for ci in cis.values())] for m, cis in gaps.items()]
        )
    return "\n".join(lines)


CAPTIONS = {
    "frontier": "Safety against help: a line a method through its lambdas (the small numbers), bars are 95 % intervals",
    "frontier_tokens": "The same at equal training tokens: rl-direct for as many as tars",
}


def save_figure(path: Path, points: list[dict], methods: Sequence[str]) -> bool:
    """Whether it was drawn: not without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    draw(figure, points, methods)
    figure.savefig(path, dpi=150)
    return True


def draw(figure, points: list[dict], methods: Sequence[str]) -> None:
    """The paper's Figure 2: DSR to the right, task score and compliance upwards; best is the upper right corner."""
    figure.set_size_inches(10, 4.8)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    looks: dict = styles(
        dict.fromkeys(dict.fromkeys(p["method"] for p in points))
    )  # the same in every figure
    for axes, key in zip(panels, ("task score", "compliance"), strict=True):
        for method in methods:
            mine = [p for p in points if p["method"] == method and p["DSR"] and p[key]]
            x, y = ([p[k] for p in mine] for k in ("DSR", key))
            tokens = [p["training tokens"]["mean"] for p in mine if p["training tokens"]]
            name = f"{method}, {sum(tokens) / len(tokens) / 1000:,.0f}k tokens" if tokens else method
            crosses = {"xerr": bars(x), "yerr": bars(y)} if all(ci["low"] is not None for ci in x + y) else {}
            style = {
                **looks[method],
                "label": label(name),
                "linestyle": "-" if len(mine) > 1 else "",
                "elinewidth": 0.8,
            }
            axes.errorbar(
                [ci["mean"] for ci in x], [ci["mean"] for ci in y], markersize=6, **crosses, **style
            )
            for p in mine:
                if p["lambda"] is not None:
                    place = p["DSR"]["mean"], p[key]["mean"]
                    axes.annotate(
                        f"{p['lambda']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7
                    )
        axes.set(
            xlabel="defense success rate, mean of direct, jailbreak, plain or GCG",
            ylabel=f"{key}, harmless and ambiguous",
        )
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    legend(figure)


def write_frontier(out: Path, seeds: Sequence[Path], lambdas: Sequence[float], methods: Sequence[str]) -> str:
    """Read the finished runs below `seeds`, write frontier.json, frontier.md and the figures to `out`; returns the markdown."""
    return write_rows(out, read_rows(seeds, lambdas, methods))


def write_rows(out: Path, rows: Rows) -> str:
    points = [
        {"method": method, "lambda": share}
        | {c: over_seeds([row[c] for row in rows[method, share]]) for c in COLUMNS}
        for method, share in (p for curve in by_method(rows).values() for p in curve)
    ]
    if not all(p["DSR"] and p["task score"] for p in points):
        raise UserError(
            "an evaluation lacks DSR or task score: delete the eval- folders, and run the same command again"
        )
    of_seeds = areas(rows)
    area = {
        name: {m: over_seeds(values) for m, values in methods.items()} for name, methods in of_seeds.items()
    }
    gaps = differences(rows, of_seeds)
    names = list(by_method(rows))
    panels: dict[str, list[str]] = {"frontier": [m for m in names if not m.endswith("-long")]}
    if any(m.endswith("-long") for m in names):
        panels["frontier_tokens"] = [m for m in names if m in ("tars", *REFERENCES) or m.endswith("-long")]
    pictures = [name for name, chosen in panels.items() if save_figure(out / f"{name}.png", points, chosen)]
    write_json(out / "frontier.json", {"points": points, **area, "tars_minus": gaps})
    text = report(points, area, gaps, pictures)
    write_text(out / "frontier.md", text)
    return text
