"""The report's figures, drawn with matplotlib where it is installed (the tables say the same)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.metrics import Interval
from lib.report.sections import keys_of
from lib.run.files import atomic

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d")
MARKERS = "osD^vPX"  # colours alone do not tell models apart for every reader
SHARE = (-0.04, 1.04)  # limits of an axis of shares


def new_figure() -> Any:
    """An empty Figure of matplotlib; None where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(layout="constrained")


def save(figure, path: str | Path) -> None:
    """As PNG, with one legend for all panels."""
    legend(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def draw_figures(results: dict, out: Path) -> list[str]:
    """Draw the figures that `results` has to OUT/NAME.png, and give their names; none without matplotlib."""
    names = []
    for draw in (draw_plane, draw_attacks, draw_outcomes, draw_budgets, draw_tokens, draw_separation):
        if (figure := new_figure()) is not None:
            draw(figure, results["models"])
            if figure.axes:  # else there was nothing to draw
                names.append(draw.__name__.removeprefix("draw_"))
                save(figure, out / f"{names[-1]}.png")
    return names


def draw_plane(figure, models: dict) -> None:
    keys = [key for key in ("compliance", "task_score") if key in keys_of(models, "plane")]
    for axes, key in zip(panels(figure, len(keys), 4.5, 4, sharey=True), keys, strict=True):
        for name, style in styles(models).items():
            plane = models[name]["plane"]
            if key in plane:
                x, y = plane[key], plane["plain_or"]
                axes.errorbar(x["mean"], y["mean"], xerr=bars([x]), yerr=bars([y]), linestyle="", **style)
        axes.set(xlabel=f"{key.replace('_', ' ')}, harmless and ambiguous", xlim=SHARE, ylim=SHARE)
    figure.supylabel("defense success rate, plain or attacked", fontsize="medium")


def draw_attacks(figure, models: dict) -> None:
    attacks, worst = leading(keys_of(models, "dsr")), keys_of(models, "worst_case")
    for axes in draw_rows(figure, models, {"dsr": attacks, "worst_case": worst}):
        axes.set(xlim=SHARE)
    figure.supxlabel("defense success rate", fontsize="medium")


def draw_tokens(figure, models: dict) -> None:
    parts = ("reasoning_tokens", "answer_tokens")
    for axes in draw_rows(figure, models, {part: sorted(keys_of(models, part)) for part in parts}):
        axes.set_xlim(left=0)


def draw_rows(figure, models: dict, keys: dict[str, list[str]]) -> list:
    """The panels: one a part of the results, in it a row a key, in that a point and its interval a model."""
    parts = [part for part in keys if keys[part]]
    heights = [0.5 + len(keys[part]) * (0.12 + 0.07 * len(models)) for part in parts]
    grid = panels(figure, len(parts), 8, sum(heights) / max(1, len(parts)), columns=1, height_ratios=heights)
    for axes, part in zip(grid, parts, strict=True):
        for i, (name, style) in enumerate(styles(models).items()):
            shift, found = (i - (len(models) - 1) / 2) * 0.8 / len(models), models[name].get(part, {})
            rows = [(row + shift, found[key]) for row, key in enumerate(keys[part]) if key in found]
            means, cis = [ci["mean"] for _, ci in rows], [ci for _, ci in rows]
            axes.errorbar(means, [y for y, _ in rows], xerr=bars(cis), linestyle="", **style)
        name_rows(axes, keys[part])
        axes.set(title=part.replace("_", " "))
    return grid


def draw_outcomes(figure, models: dict) -> None:
    """A panel a model, a bar an attack, cut in three."""
    attacks = keys_of(models, "outcomes")
    ends = {"refused": COLORS[0], "useless": "#bbbbbb", "leaked": COLORS[1]}
    met = {name: m["outcomes"] for name, m in models.items() if m.get("outcomes")}
    grid = panels(figure, len(met), 2.4, 0.8 + 0.2 * len(attacks), sharey=True)
    for axes, (name, found) in zip(grid, met.items(), strict=True):
        left = [0.0] * len(attacks)
        for end, color in ends.items():
            widths = [found[attack][end]["mean"] if attack in found else 0.0 for attack in attacks]
            axes.barh(range(len(attacks)), widths, left=left, color=color, label=end)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        name_rows(axes, attacks)
        axes.set(title=label(name), xlabel="share of requests", xlim=(0, 1))


def draw_budgets(figure, models: dict) -> None:
    attacks = leading(keys_of(models, "dsr_by_budget"))
    for axes, attack in zip(panels(figure, len(attacks), 2.6, 2.4, sharey=True), attacks, strict=True):
        for name, style in styles(models).items():
            if curve := models[name]["dsr_by_budget"].get(attack):
                steps, cis = zip(*curve, strict=True)
                axes.errorbar(steps, [ci["mean"] for ci in cis], yerr=bars(cis), **style)
        axes.set(title=label(attack), xlabel="steps or tries", ylim=SHARE)
    figure.supylabel("defense success rate", fontsize="medium")


def draw_separation(figure, models: dict) -> None:
    keys = keys_of(models, "separation")
    found = [(key, name) for key in keys for name, m in models.items() if key in m["separation"]]
    for axes, (key, name) in zip(panels(figure, len(found), 2.8, 2.8), found, strict=True):
        s = models[name]["separation"][key]
        for group, color, marker, text in ((1, COLORS[1], "o", "harmful"), (-1, COLORS[2], "^", "safe")):
            x, y, _ = zip(*(point for point in s["points"] if point[2] == group), strict=True)
            axes.scatter(x, y, s=14, alpha=0.6, color=color, marker=marker, label=text)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.set_title(f"{label(name)}: {label(key)}\nmargin {s['margin']:.2f}", fontsize=9)


def panels(figure, count: int, width: float, height: float, columns: int = 4, **options: Any) -> list:
    """`count` axes, up to `columns` of them side by side, each of `width` x `height` inches."""
    columns = min(columns, count)
    rows = -(-count // columns) if count else 0
    figure.set_size_inches(max(5.0, width * columns), 0.6 + height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, **options).flatten() if count else []
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
    return list(grid[:count])


def name_rows(axes, keys: Sequence[str]) -> None:
    """A row a key from the top down, with lines between the rows instead of through them."""
    axes.set(yticks=range(len(keys)), yticklabels=map(label, keys), ylim=(len(keys) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    for row in range(1, len(keys)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)


def leading(attacks: Sequence[str]) -> list[str]:
    """Without those of which there is a "plain_or_X": figures show that one, tables both."""
    return [attack for attack in attacks if f"plain_or_{attack}" not in attacks]


def styles(models: dict) -> dict[str, dict[str, Any]]:
    """How each model is drawn, in all figures alike."""
    looks = zip(models, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    size = {"capsize": 3, "markersize": 5}
    return {name: {"color": c, "marker": m, "label": label(name), **size} for name, c, m in looks}


def legend(figure) -> None:
    """One for all panels: not every model has to be in each."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        found |= zip(names, handles, strict=True)
    figure.legend(found.values(), found, loc="outside upper center", ncols=min(5, len(found)), frameon=False)


def label(text: str) -> str:
    """Text as it is: no formula, no line break, no first character that hides it from the legend."""
    text = "".join(c if c.isprintable() else " " for c in text)[:40].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def bars(cis: Sequence[Interval]) -> list[list[float]]:
    """Distances from the means to their bounds, below and above, never negative by rounding."""
    return [[max(0.0, c["mean"] - c["low"]) for c in cis], [max(0.0, c["high"] - c["mean"]) for c in cis]]
