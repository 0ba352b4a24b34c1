"""What rainbow teaming found: archive.json, archive.md and archive.png."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from lib.attacks.rainbow_grid import Elite, Grid
from lib.metrics import bootstrap, student_t
from lib.run.files import atomic, write_json, write_text

Found = dict[tuple[int, str, str], Elite]  # by archive, risk and style
Harms = Sequence[float | None]  # of the answers to one prompt; None: no verdict


def write_summary(
    folder: Path,
    grid: Grid,
    found: Found,
    fresh: dict[str, Harms],
    counts: list[dict],
    threshold: float,
    seed: int,
) -> None:
    """`fresh`: harms of answers that no search has seen, by prompt: of the archives, and of the plain prompts that they are
    compared with. Intervals are over prompts; and over archives where there are several, since the prompts of one have
    ancestors in common. "success" is the share of answers with harm of `threshold` or more.
    """
    elites = [elite.prompt for elite in found.values()]
    plain = [prompt for prompt in fresh if prompt not in set(elites)]
    cells = len(counts) * len(grid.risks) * len(grid.styles)
    summary: dict = {
        "risks": list(grid.risks),
        "styles": list(grid.styles),
        "archives": counts,
        "filled": len(found) / cells,
    }
    for name, limit in (("harm", None), ("success", threshold)):
        value = {
            prompt: mean_harm(harms, limit)
            for prompt, harms in fresh.items()
            if any(h is not None for h in harms)
        }
        groups = {"archive": elites, "plain": plain}
        summary[name] = {
            group: bootstrap([value[p] for p in prompts if p in value], seed)
            for group, prompts in groups.items()
        }
        if len(counts) > 1:
            numbers = range(len(counts))
            parts = [
                [value[e.prompt] for (n, *_), e in found.items() if n == i and e.prompt in value]
                for i in numbers
            ]
            summary[name]["archive, over archives"] = student_t([sum(part) / len(part) for part in parts])
    summary["harm"]["archive, as the search saw it"] = bootstrap(
        [mean_harm(elite.harms) for elite in found.values()], seed
    )
    write_json(folder / "archive.json", summary | {"harm_threshold": threshold})
    table = harm_by_cell(grid, found, fresh)
    rows = [["", *grid.styles], ["---"] * (1 + len(grid.styles))]
    rows += [
        [risk, *("" if h is None else f"{h:.2f}" for h in row)]
        for risk, row in zip(grid.risks, table, strict=True)
    ]
    write_text(folder / "archive.md", "".join(f"| {' | '.join(row)} |\n" for row in rows))
    draw_archive(folder / "archive.png", grid, table)


def mean_harm(harms: Harms, threshold: float | None = None) -> float:
    """Mean of the verdicts, at least one; with a threshold, the share of them that reach it.

    >>> mean_harm([1.0, None, 0.5]), mean_harm([1.0, None, 0.2], 0.5)
    (0.75, 0.5)
    """
    known = [harm if threshold is None else float(harm >= threshold) for harm in harms if harm is not None]
    return sum(known) / len(known)


def harm_by_cell(grid: Grid, found: Found, fresh: dict[str, Harms]) -> list[list[float | None]]:
    """[risk][style], mean over the fresh answers of all archives; None where none has a prompt with a verdict."""
    harms: dict[tuple[str, str], list[float]] = {
        (risk, style): [] for risk in grid.risks for style in grid.styles
    }
    for (_, risk, style), elite in found.items():
        harms[risk, style] += [harm for harm in fresh[elite.prompt] if harm is not None]
    return [
        [mean_harm(harms[risk, style]) if harms[risk, style] else None for style in grid.styles]
        for risk in grid.risks
    ]


def draw_archive(path: Path, grid: Grid, table: list[list[float | None]]) -> None:
    """The heat map of harm by cell; nothing without matplotlib (the table says the same)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(3.5 + 0.6 * len(grid.styles), 1.8 + 0.4 * len(grid.risks)), layout="constrained")
    axes = figure.subplots()
    values = [[float("nan") if harm is None else harm for harm in row] for row in table]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="inferno", aspect="auto")
    axes.set_xticks(range(len(grid.styles)), grid.styles, rotation=45, ha="right")
    axes.set_yticks(range(len(grid.risks)), grid.risks)
    for y, row in enumerate(table):
        for x, harm in enumerate(row):
            if harm is not None:
                axes.text(
                    x,
                    y,
                    f"{harm:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if harm > 0.6 else "white",
                )
    figure.colorbar(image, label="harm, on fresh answers")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    with atomic(path) as temporary:
        temporary.write_bytes(file.getvalue())
