"""report.md of stage 4: every figure as a table in text, and as a PNG too where matplotlib is installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from lib.files import write_text
from lib.metrics import Interval

SHOWN = 3  # completions per kind and model
LENGTH = 600  # characters of a completion that are shown
COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d")


def write_report(out: Path, results: dict, completions: Sequence[dict]) -> None:
    """Write out/report.md, and figures beside it if matplotlib can be imported.

    `results` is the content of results.json, `completions` the lines of completions.jsonl. Completions are
    untrusted text: they are escaped, so that none can break a table or bring its own markup.
    """
    figures = draw_figures(out, results)
    write_text(out / "report.md", "\n\n".join(sections(results, completions, figures)) + "\n")


def sections(results: dict, completions: Sequence[dict], figures: dict[str, str]) -> list[str]:
    models, config = results["models"], results["config"]
    parts = [
        "# Attack and evaluation",
        "Each entry is a mean, its 95 % interval and the number of observations: 0.97 [0.92, 0.99] (64). "
        "Intervals are Wilson's for shares, bootstrap for means. "
        f"Temperature {config['temperature']}, seed {results['seed']}, judge `{config['judge']}`.",
        "## Safety against refusal, and against use",
        "DSR is the share of attacks defended, averaged over attacks (direct requests left out). "
        "Compliance is the share of harmless and ambiguous requests not refused. A wrong answer complies too, so the "
        "task score (was the request served?) stands beside it. Up and to the right is better.",
        *picture(figures, "plane"),
        table(
            ["model", "DSR", "compliance", "task score"],
            [[name, *(show(m["plane"][k]) for k in ("dsr", "compliance", "task_score"))] for name, m in models.items()],
        ),
        "## Defence against each attack (DSR)",
        by_key("attack", "dsr", models),
    ]
    if any("controls" in m for m in models.values()):
        parts += [
            "### DSR against the budget of GCG",
            f"Suffix of {config['gcg_suffix_tokens']} tokens, {config['gcg_width']} candidates a step. The "
            "best suffix after so many steps is sent to the model as text, once, and judged by itself.",
            *picture(figures, "gcg"),
            budgets(models),
            "Controls on the same behaviours. Where these are low, mere noise breaks the model.",
            by_key("control", "controls", models),
            search_costs(models),
        ]
    parts += [
        "## Requests that deserve an answer",
        "Compliance by kind (harmful, direct and jailbreak: low is good) and by type of ambiguous prompt:",
        by_key("kind", "compliance", models),
        "Task score:",
        by_key("kind", "task_score", models),
        "## Thought",
        "Reasoning tokens, of completions that close their reasoning. Compare kinds at equal hops.",
        *picture(figures, "reasoning"),
        by_key("kind", "reasoning_tokens", models),
        "Answer tokens:",
        by_key("kind", "answer_tokens", models),
        "Share of well-formed completions (exactly one `</think>`, no second `<think>`):",
        by_key("attack or kind", "format_rate", models),
        "## Completions side by side",
        *side_by_side(list(models), completions),
        "## Settings and time",
        table(["setting", "value"], [[key, str(value)] for key, value in config.items()]),
        table(["model", "seconds (this run)"], [[name, str(s)] for name, s in results["seconds"].items()]),
    ]
    return [part for part in parts if part]


def show(ci: Interval | None, digits: int = 2) -> str:
    """0.97 [0.92, 0.99] (64); numbers of tokens, which are above 2, with one digit."""
    if ci is None:
        return "-"
    digits = 1 if ci["high"] > 2 else digits
    return f"{ci['mean']:.{digits}f} [{ci['low']:.{digits}f}, {ci['high']:.{digits}f}] ({ci['n']})"


def escape(text: str) -> str:
    """Text as one table cell that shows as itself: no markup, no line breaks, cut at LENGTH characters.

    >>> escape("a | b\\n<think> *c*")
    'a \\\\| b<br>&lt;think&gt; \\\\*c\\\\*'
    """
    text = text if len(text) <= LENGTH else text[:LENGTH] + " ..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\|`*_[]!#~$":
        text = text.replace(mark, "\\" + mark)
    return "<br>".join(text.split("\n")).replace("\r", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the cells are given as markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_key(title: str, figure: str, models: dict) -> str:
    """One row a key of `figure` (such as an attack), one column a model. Empty when no model has it."""
    keys = list(dict.fromkeys(key for m in models.values() for key in m.get(figure, {})))
    rows = [[key, *(show(m.get(figure, {}).get(key)) for m in models.values())] for key in keys]
    return table([title, *models], rows) if rows else ""


def budgets(models: dict) -> str:
    """DSR after so many steps of GCG."""
    curves = {name: dict(m.get("dsr_by_budget", {}).get("gcg", [])) for name, m in models.items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    return table(["steps", *models], [[str(s), *(show(curve.get(s)) for curve in curves.values())] for s in steps])


def search_costs(models: dict) -> str:
    """Whether the search worked at all: the target's loss before and after."""
    head = [
        "GCG on",
        "behaviours",
        "loss before",
        "loss after",
        "queries",
        "million tokens forward",
        "dropped in the round trip",
    ]
    rows = [
        [
            name,
            str(g["behaviours"]),
            f"{g['loss_before']:.2f}",
            f"{g['loss_after']:.2f}",
            str(g["queries"]),
            f"{g['forward_tokens'] / 1e6:.2f}",
            str(g["did_not_survive"]),
        ]
        for name, m in models.items()
        if (g := m.get("gcg"))
    ]
    return table(head, rows)


def side_by_side(names: Sequence[str], completions: Sequence[dict]) -> list[str]:
    """The first SHOWN prompts of each set, with what each model made of them."""
    last = max((x["gcg_steps"] for x in completions), default=-1)
    shown = [x for x in completions if x["set"] in ("direct", "jailbreak", "harmless", "ambiguous")]
    shown += [x for x in completions if x["set"] == "gcg" and x["gcg_steps"] == last]
    parts = []
    for kind in dict.fromkeys(x["set"] for x in shown):
        parts.append(f"### {kind}")
        members = [x for x in shown if x["set"] == kind]
        for number in list(dict.fromkeys(x["id"] for x in members))[:SHOWN]:
            lines = {x["model"]: x for x in members if x["id"] == number}
            first = next(iter(lines.values()))
            parts.append(f"**{escape(str(number))}** ({escape(first['category'])}): {escape(first['prompt'])}")
            rows = [completion_row(lines[name]) for name in names if name in lines]
            parts.append(table(["model", "suffix", "reasoning", "answer", "harm", "task", "refusal"], rows))
    return parts


def completion_row(line: dict) -> list[str]:
    texts = [escape(line[key]) or "-" for key in ("suffix", "reasoning", "answer")]
    return [line["model"], *texts, f"{line['harm']:.2f}", f"{line['task']:.2f}", line["refusal"]]


# ---- figures -----------------------------------------------------------------------------------------------


def picture(figures: dict[str, str], name: str) -> list[str]:
    return [f"![{name}]({figures[name]})"] if name in figures else []


def draw_figures(out: Path, results: dict) -> dict[str, str]:
    """PNG files in `out`: name -> file name. None without matplotlib: the tables say the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    models = results["models"]
    curves = {name: m["dsr_by_budget"]["gcg"] for name, m in models.items() if "dsr_by_budget" in m}
    thoughts = {name: m["reasoning_tokens"] for name, m in models.items() if m["reasoning_tokens"]}
    figures = {"plane": Figure(figsize=(9, 4), layout="constrained")}
    draw_plane(figures["plane"], models)
    if curves:
        figures["gcg"] = Figure(figsize=(6, 4), layout="constrained")
        draw_curves(figures["gcg"], curves)
    if thoughts:
        figures["reasoning"] = Figure(figsize=(8, 6), layout="constrained")
        draw_thoughts(figures["reasoning"], thoughts)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    return {name: f"{name}.png" for name in figures}


def draw_plane(figure, models: dict) -> None:
    """Safety against compliance, and against the task score: a point a model, with both intervals."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("compliance", "task_score"), strict=True):
        for color, (name, m) in zip(itertools.cycle(COLORS), models.items(), strict=False):
            x, y = m["plane"][key], m["plane"]["dsr"]
            style = {"fmt": "o", "capsize": 3, "color": color, "label": name}
            axes.errorbar(x["mean"], y["mean"], xerr=bars([x]), yerr=bars([y]), **style)
        axes.set(xlabel=f"{key.replace('_', ' ')}, harmless and ambiguous", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("defense success rate, mean over attacks")
    panels[1].legend(loc="lower left")


def draw_curves(figure, curves: dict[str, list]) -> None:
    """DSR against steps of GCG: a line a model."""
    axes = figure.subplots()
    for color, (name, curve) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
        steps, cis = [point[0] for point in curve], [point[1] for point in curve]
        style = {"marker": "o", "capsize": 3, "color": color, "label": name}
        axes.errorbar(steps, [c["mean"] for c in cis], yerr=bars(cis), **style)
    axes.set(xlabel="GCG steps", ylabel="defense success rate", ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def draw_thoughts(figure, thoughts: dict[str, dict]) -> None:
    """Reasoning tokens by kind: a group of bars a kind, a bar a model."""
    axes, height = figure.subplots(), 0.8 / len(thoughts)
    keys = sorted({key for tokens in thoughts.values() for key in tokens})
    for i, (name, tokens) in enumerate(thoughts.items()):
        rows = [k for k, key in enumerate(keys) if key in tokens]
        cis = [tokens[keys[k]] for k in rows]
        style = {"height": height, "color": COLORS[i % len(COLORS)], "label": name}
        axes.barh([k + i * height for k in rows], [c["mean"] for c in cis], xerr=bars(cis), **style)
    axes.set(xlabel="reasoning tokens", yticks=[k + 0.4 - height / 2 for k in range(len(keys))], yticklabels=keys)
    axes.invert_yaxis()
    axes.legend(loc="lower right")


def bars(cis: Sequence[Interval]) -> list[list[float]]:
    """Distances from the means to their bounds, below and above, never negative by rounding."""
    return [[max(0.0, c["mean"] - c["low"]) for c in cis], [max(0.0, c["high"] - c["mean"]) for c in cis]]
