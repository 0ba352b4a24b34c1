"""The report's figures and learning curves, drawn with matplotlib where it is installed."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.metrics import Interval
from lib.report.sections import keys_of
from lib.rewards import KINDS
from lib.run.files import atomic, read_log

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d")
MARKERS = "osD^vPX"  # colours alone do not tell models apart for every reader
SHARE = (-0.04, 1.04)  # limits of an axis of shares


def draw_figures(results: dict, out: Path) -> list[str]:
    """Draw the figures that `results` has to OUT/NAME.png, and give their names; none without matplotlib."""
    figures = {"plane": draw_plane, "attacks": draw_attacks, "budgets": draw_budgets}
    figures["separation"] = draw_separation
    return [name for name, draw in figures.items() if save(draw, results["models"], out / f"{name}.png")]


def draw_curves(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw metrics.jsonl of stage 2 or 3 into a PNG, if anything is logged, and matplotlib is there."""
    save(draw_log, read_log(metrics_path), png_path)


def save(draw: Callable[[Any, Any], None], data: Any, path: str | Path) -> bool:
    """Save what draw(figure, data) draws as PNG, if anything, and where matplotlib is installed: did it?

    It has one legend for all panels, since not every model has to be in each.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    draw(figure, data)
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        found |= zip(names, handles, strict=True)
    if figure.axes:
        figure.legend(
            found.values(), found, loc="outside upper center", ncols=min(5, len(found)), frameon=False
        )
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return bool(figure.axes)


def draw_plane(figure, models: dict) -> None:
    keys = [key for key in ("compliance", "task_score") if key in keys_of(models, "plane")]
    for axes, key in zip(panels(figure, len(keys), 4.5, 4), keys, strict=True):
        for name, style in styles(models).items():
            plane = models[name]["plane"]
            if key in plane:
                x, y = plane[key], plane["plain_or"]
                axes.errorbar(x["mean"], y["mean"], xerr=bars([x]), yerr=bars([y]), linestyle="", **style)
        axes.set(xlabel=f"{key.replace('_', ' ')}, harmless and ambiguous", xlim=SHARE, ylim=SHARE)
    figure.supylabel("defense success rate, plain or attacked", fontsize="medium")


def draw_attacks(figure, models: dict) -> None:
    """A row an attack, in it a point and its interval a model."""
    attacks = leading(keys_of(models, "dsr"))
    for axes in panels(figure, 1, 8, 0.5 + len(attacks) * (0.12 + 0.07 * len(models))):
        for i, (name, style) in enumerate(styles(models).items()):
            shift, found = (i - (len(models) - 1) / 2) * 0.8 / len(models), models[name]["dsr"]
            rows = [row + shift for row, attack in enumerate(attacks) if attack in found]
            cis = [found[attack] for attack in attacks if attack in found]
            axes.errorbar([ci["mean"] for ci in cis], rows, xerr=bars(cis), linestyle="", **style)
        axes.set(yticks=range(len(attacks)), yticklabels=map(label, attacks), ylim=(len(attacks) - 0.5, -0.5))
        axes.set(xlabel="defense success rate", xlim=SHARE)


def draw_budgets(figure, models: dict) -> None:
    attacks = leading(keys_of(models, "dsr_by_budget"))
    for axes, attack in zip(panels(figure, len(attacks), 2.6, 2.4), attacks, strict=True):
        for name, style in styles(models).items():
            if curve := models[name]["dsr_by_budget"].get(attack):
                steps, cis = zip(*curve, strict=True)
                axes.errorbar(steps, [ci["mean"] for ci in cis], yerr=bars(cis), **style)
        axes.set(title=label(attack), xlabel="steps or tries", ylim=SHARE)
    figure.supylabel("defense success rate", fontsize="medium")


def draw_separation(figure, models: dict) -> None:
    keys = keys_of(models, "separation_map")
    found = [(key, name) for key in keys for name, m in models.items() if key in m["separation_map"]]
    for axes, (key, name) in zip(panels(figure, len(found), 2.8, 2.8), found, strict=True):
        points, s = models[name]["separation_map"][key], models[name]["separation"]
        accuracy, margin = (s[f"{key}/{part}"]["mean"] for part in ("accuracy", "margin"))
        for group, color, marker, text in ((1, COLORS[1], "o", "harmful"), (-1, COLORS[2], "^", "safe")):
            x, y, _ = zip(*(point for point in points if point[2] == group), strict=True)
            axes.scatter(x, y, s=14, alpha=0.6, color=color, marker=marker, label=text)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        title = f"{label(name)}: {label(key)}\naccuracy {accuracy:.2f}, margin {margin:.2f}"
        axes.set_title(title, fontsize=9)


# ---- learning curves: the title of a panel, and {key of metrics.jsonl: its name in the legend} -------------

WARMSTART = {"loss (nats a token)": {"loss": "training", "held_out_loss": "held out"}}
RL = {"reward": "reward", "refusal rate": "refusal_rate", "reasoning tokens": "reasoning_tokens"}
RL |= {"well-formed": "format_rate", "groups without a signal": "zero_advantage_groups"}
RL |= {"KL to the reference (nats a token)": "kl"}
BY_KIND = {title: {key: "all", **{f"{key}_{kind}": kind for kind in KINDS}} for title, key in RL.items()}


def draw_log(figure, records: Sequence[dict]) -> None:
    """Faint: every step that has a value. Plain: the mean over a twentieth of the run around it."""
    logged = {key for record in records for key, value in record.items() if value is not None}
    plan = BY_KIND if "reward" in logged else WARMSTART
    titles = [title for title in plan if plan[title].keys() & logged]
    for axes, title in zip(panels(figure, len(titles), 3.6, 2.6, columns=3), titles, strict=True):
        for color, (key, name) in zip(("#444444", *COLORS), plan[title].items(), strict=False):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                steps, values = np.array(points, dtype=float).T
                width = 1 + 2 * (len(points) // 40)  # odd: as many before a step as behind it
                means = np.convolve(values, np.full(width, 1 / width), "valid")
                dot = "o" if len(points) < 10 else ""
                axes.plot(steps, values, color=color, alpha=0.25)
                axes.plot(steps[width // 2 :][: len(means)], means, marker=dot, color=color, label=name)
        axes.set(title=title, xlabel="step")


# ---- what figures share ------------------------------------------------------------------------------------


def panels(figure, count: int, width: float, height: float, columns: int = 4) -> list:
    """`count` axes, up to `columns` of them side by side, each of `width` x `height` inches."""
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    figure.set_size_inches(max(5.0, width * columns), 0.6 + height * rows)
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axes in grid:
        axes.grid(alpha=0.3)
    return grid


def leading(attacks: Sequence[str]) -> list[str]:
    """Without those of which there is a "plain_or_X": figures show that one, tables both."""
    return [attack for attack in attacks if f"plain_or_{attack}" not in attacks]


def styles(models: dict) -> dict[str, dict[str, Any]]:
    """How each model is drawn, in all figures alike."""
    looks = zip(models, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    size = {"capsize": 3, "markersize": 5}
    return {name: {"color": c, "marker": m, "label": label(name), **size} for name, c, m in looks}


def label(text: str) -> str:
    """Text as it is, 40 characters a line: no formula, no first character that hides it from the legend."""
    text = textwrap.fill("".join(c if c.isprintable() else " " for c in text), 40).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def bars(cis: Sequence[Interval]) -> list[list[float]]:
    """Distances from the means to their bounds, below and above, never negative by rounding."""
    return [[max(0.0, c["mean"] - c["low"]) for c in cis], [max(0.0, c["high"] - c["mean"]) for c in cis]]
