"""Figures of the report: as text, and drawn with matplotlib where it is installed (the tables say the same).

A figure is a `ci` of lib/metrics.py: {"mean": m, "low": l, "high": h, "n": observations}.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from lib.metrics import Interval

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d")
MARKERS = "osD^vPX"  # colours alone do not tell models apart for every reader
CAPTIONS = {
    "plane": "Safety against compliance, and against the task score: a point a model, with both intervals.",
    "attacks": "DSR under each attack, and in the worst case over them (shaded).",
    "outcomes": "What became of the requests: refused, answered uselessly (which counts as defended), or leaked.",
    "budgets": "DSR against the attacker's budget, one panel an attack.",
    "tokens": "Tokens of the reasoning and of the answer, by kind of prompt.",
    "separation": "Embeddings of prompts, projected to two dimensions, and the margin between the two groups.",
}
NUMBER = re.compile(r"-|nan|[-+]?[\d,.]+(e[-+]\d+)?( \[[-+]?[\d.]+, [-+]?[\d.]+\] \(\d+\))?")

# ---- as text -----------------------------------------------------------------------------------------------


def show(ci: Interval | None, sign: str = "") -> str:
    """Mean, interval and observations; numbers of tokens, which are above 2, with one digit.

    >>> show({"mean": 0.97, "low": 0.92, "high": 0.99, "n": 64}, "+")
    '+0.97 [+0.92, +0.99] (64)'
    """
    if ci is None:
        return "-"
    digits = 1 if ci["high"] > 2 else 2
    mean, low, high = (
        f"{round(ci[key], digits) + 0.0:{sign}.{digits}f}" for key in ("mean", "low", "high")
    )  # no -0.00
    return f"{mean} [{low}, {high}] ({ci['n']})"


def number(value: Any) -> str:
    """1,234; 0.12; "-" for None; text as it is.

    >>> [number(value) for value in (1234, 2.345, 0.0042, 0.0, None, "white-box")]
    ['1,234', '2.35', '0.0042', '0.00', '-', 'white-box']
    """
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:,.2f}"


def is_number(text: str) -> bool:
    """Whether it is what `show` or `number` makes of a figure: it needs no escaping, and stands on the right of its column."""
    return NUMBER.fullmatch(text) is not None


# ---- drawn -------------------------------------------------------------------------------------------------


def draw_figures(results: dict) -> dict[str, bytes]:
    """Name -> PNG, of the figures that `results` has. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    pictures = {}
    for name, draw in DRAWINGS.items():
        figure = Figure(layout="constrained")
        draw(figure, results["models"])
        if figure.axes:  # else there was nothing to draw
            file = io.BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
                figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
            pictures[name] = file.getvalue()
    return pictures


def draw_plane(figure, models: dict) -> None:
    keys = [
        key for key in ("compliance", "task_score") if any(key in m.get("plane", {}) for m in models.values())
    ]
    if not keys:
        return
    figure.set_size_inches(9, 4.2)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        for name, style in styles(models).items():
            plane = models[name].get("plane", {})
            if key in plane:
                x, y = plane[key], plane.get("plain_or", plane["dsr"])
                axes.errorbar(
                    x["mean"], y["mean"], xerr=bars([x]), yerr=bars([y]), markersize=8, linestyle="", **style
                )
        axes.set(
            xlabel=f"{key.replace('_', ' ')}, harmless and ambiguous", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05)
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("defense success rate,\nplain or attacked, mean over attacks")
    legend(figure)


def draw_attacks(figure, models: dict) -> None:
    """A row an attack, a point a model; the worst cases below, shaded."""
    attacks, worst = keys_of(models, "dsr"), keys_of(models, "worst_case")
    if attacks:
        keys = [*attacks, *(f"worst case: {key}" for key in worst)]
        found = {
            name: {
                **m.get("dsr", {}),
                **{f"worst case: {key}": ci for key, ci in (m.get("worst_case") or {}).items()},
            }
            for name, m in models.items()
        }
        figure.set_size_inches(8, 1.2 + len(keys) * (0.12 + 0.08 * len(models)))
        axes = figure.subplots()
        draw_rows(axes, models, found, keys)
        if worst:
            axes.axhspan(len(attacks) - 0.5, len(keys) - 0.5, color="#000000", alpha=0.08, linewidth=0)
        axes.set(xlabel="defense success rate", xlim=(-0.03, 1.03))
        legend(figure)


def draw_outcomes(figure, models: dict) -> None:
    """A bar an attack and a model, cut in three."""
    rows = [
        (a, name)
        for a in keys_of(models, "outcomes")
        for name, m in models.items()
        if a in (m.get("outcomes") or {})
    ]
    if not rows:
        return
    figure.set_size_inches(8, 1.2 + 0.22 * len(rows))
    axes, left = figure.subplots(), [0.0] * len(rows)
    for end, color in zip(("refused", "useless", "leaked"), (COLORS[0], "#bbbbbb", COLORS[1]), strict=True):
        widths = [models[name]["outcomes"][attack][end]["mean"] for attack, name in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=end)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(yticks=range(len(rows)), yticklabels=[label(f"{attack}, {name}") for attack, name in rows])
    axes.set(xlabel="share of requests", xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    legend(figure)


def draw_budgets(figure, models: dict) -> None:
    attacks = keys_of(models, "dsr_by_budget")
    if not attacks:
        return
    columns = min(3, len(attacks))
    rows = -(-len(attacks) // columns)
    figure.set_size_inches(max(5.0, 3.2 * columns), 0.5 + 2.6 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(attacks) :]:
        axes.remove()
    for axes, attack in zip(panels, attacks, strict=False):
        for name, style in styles(models).items():
            curve = models[name].get("dsr_by_budget", {}).get(attack, [])
            cis = [ci for _, ci in curve]
            if curve:
                axes.errorbar(
                    [step for step, _ in curve],
                    [ci["mean"] for ci in cis],
                    yerr=bars(cis),
                    markersize=5,
                    **style,
                )
        axes.set(title=label(attack), xlabel="steps or tries", ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    figure.supylabel("defense success rate", fontsize="medium")
    legend(figure)


def draw_tokens(figure, models: dict) -> None:
    parts = [
        part for part in ("reasoning_tokens", "answer_tokens") if any(m.get(part) for m in models.values())
    ]
    keys = sorted(keys_of(models, *parts))
    if keys:
        figure.set_size_inches(9, 1.2 + len(keys) * (0.12 + 0.06 * len(models)))
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, part in zip(panels, parts, strict=True):
            draw_rows(axes, models, {name: m.get(part, {}) for name, m in models.items()}, keys)
            axes.set(xlabel=part.replace("_", " "))
            axes.set_xlim(left=0)
        legend(figure)


def draw_rows(axes, models: dict, figures: dict[str, dict[str, Interval]], keys: Sequence[str]) -> None:
    """A row a key from the top down, a point with its interval a model, one below the other."""
    for i, (name, style) in enumerate(styles(models).items()):
        rows = [row for row, key in enumerate(keys) if key in figures[name]]
        cis = [figures[name][keys[row]] for row in rows]
        places = [row + (i - (len(models) - 1) / 2) * 0.8 / len(models) for row in rows]
        axes.errorbar([ci["mean"] for ci in cis], places, xerr=bars(cis), markersize=5, linestyle="", **style)
    axes.set(yticks=range(len(keys)), yticklabels=[label(key) for key in keys], ylim=(len(keys) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    axes.hlines(
        [row + 0.5 for row in range(len(keys) - 1)],
        0,
        1,
        transform=axes.get_yaxis_transform(),
        color="#dddddd",
        linewidth=0.8,
    )


def draw_separation(figure, models: dict) -> None:
    found = {
        f"{name}, {groups}": s for name, m in models.items() for groups, s in m.get("separation", {}).items()
    }
    if not found:
        return
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure.set_size_inches(4.4 * columns, 0.4 + 3.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(found) :]:
        axes.remove()
    for axes, (name, s) in zip(panels, found.items(), strict=False):
        for group, color, marker, text in zip(
            (1, -1), (COLORS[1], COLORS[2]), "o^", ("harmful", "safe"), strict=True
        ):
            points = [point for point in s["points"] if point[2] == group]
            style = {"color": color, "marker": marker, "label": label(text)}
            axes.scatter([p[0] for p in points], [p[1] for p in points], s=14, alpha=0.6, **style)
        axes.set(
            title=f"{label(name)}: margin {s['margin']:.2f}",
            xticks=[],
            yticks=[],
            aspect="equal",
            adjustable="datalim",
        )
        axes.title.set_fontsize(9)
    legend(figure)


DRAWINGS = {
    "plane": draw_plane,
    "attacks": draw_attacks,
    "outcomes": draw_outcomes,
    "budgets": draw_budgets,
    "tokens": draw_tokens,
    "separation": draw_separation,
}


def styles(models: dict) -> dict[str, dict[str, Any]]:
    """How each model is drawn, in all figures alike."""
    looks = zip(models, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    return {
        name: {"color": color, "marker": marker, "capsize": 3, "label": label(name)}
        for name, color, marker in looks
    }


def legend(figure) -> None:
    """One for all panels: not every model has to be in each."""
    found = {
        text: handle
        for axes in figure.axes
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=min(5, len(found)), frameon=False
    )


def keys_of(models: dict, *parts: str) -> list[str]:
    """The keys, such as attacks, that some model has in its `parts`; in the order of the model that has most."""
    found = [m.get(part) or {} for part in parts for m in models.values()]
    return list(dict.fromkeys(key for keys in sorted(found, key=len, reverse=True) for key in keys))


def label(text: str) -> str:
    """Text as it is: no formula, no line break, and a first character that does not hide it from the legend."""
    text = "".join(c if c.isprintable() else " " for c in text)[:40].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def bars(cis: Sequence[Interval]) -> list[list[float]]:
    """Distances from the means to their bounds, below and above, never negative by rounding."""
    return [[max(0.0, c["mean"] - c["low"]) for c in cis], [max(0.0, c["high"] - c["mean"]) for c in cis]]
