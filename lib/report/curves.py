"""Learning curves: what stages 2 and 3 have logged in metrics.jsonl, as small panels in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.report.figures import COLORS, new_figure, panels, save
from lib.rewards import KINDS
from lib.run.files import read_log


def by_kind(key: str) -> dict[str, str]:
    return {key: "all", **{f"{key}_{kind}": kind for kind in KINDS}}


# The title of a panel: {key of metrics.jsonl: its name in the legend}
WARMSTART = {"loss (nats a token)": {"loss": "training", "held_out_loss": "held out"}}
RL = {
    "reward": by_kind("reward"),
    "refusal rate": by_kind("refusal_rate"),
    "reasoning tokens": by_kind("reasoning_tokens"),
    "well-formed": by_kind("format_rate"),
    "groups without a signal": {"zero_advantage_groups": "all"},
    "KL to the reference (nats a token)": {"kl": "all"},
}


def draw_curves(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw metrics.jsonl of stage 2 or 3 into a PNG; nothing without matplotlib, or where nothing is logged.

    Faint: every step that has a value. Plain: the mean over a twentieth of the run around it.
    """
    records, figure = read_log(metrics_path), new_figure()
    if figure is None or not records:
        return
    plan = RL if "reward" in records[0] else WARMSTART
    logged = {key for record in records for key, value in record.items() if value is not None}
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
    save(figure, png_path)
