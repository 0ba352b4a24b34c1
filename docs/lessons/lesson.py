"""What the four lessons share: where the run is, a table, a figure of the report.

They work in the project's folder, whoever starts them: a shell, a notebook, a test.
"""

import importlib
import os
import sys
from dataclasses import fields
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("LESSON_RUN", "runs/demo"))  # data, sft, rl and eval of one run
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6, 3), "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": "small"})
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
if not (RUN / "eval/results.json").exists():
    sys.exit(f"error: {RUN} holds no finished run: make demo")


def chapter(name):
    """A chapter as a module. Its name begins with a digit, so `import` cannot say it."""
    return importlib.import_module(name)


def settings_of(module, folder, **others):
    """The settings of a chapter's run, as they stand in its folder. `others` are put in their place."""
    saved = importlib.import_module("lib.run.folder").read_settings(folder)
    known = {field.name: saved[field.name] for field in fields(module.Settings) if field.name in saved}
    data = RUN / Path(saved["data"]).name  # wherever the run lies now
    return module.Settings(**known | {"data": str(data)} | others)


def table(header, rows):
    """Print rows under a header "name | name": numbers right, texts left, and an empty line."""
    rows = [[x if isinstance(x, (int, str)) else f"{x:.3f}" for x in row] for row in rows]
    names = header.split(" | ")
    widths = [max(len(str(row[i])) for row in [names, *rows]) for i in range(len(names))]
    print("  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)).rstrip())
    for row in rows:
        number = [str(x).lstrip("-")[:1].isdigit() for x in row]
        cells = zip(row, widths, number, strict=True)
        print("  ".join(f"{x!s:>{w}}" if n else f"{x!s:<{w}}" for x, w, n in cells).rstrip())
    print()


def show(**labels):
    """What plt.plot has drawn, with these labels of the axes."""
    axes = plt.gca()
    axes.set(**labels)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    plt.show()


def show_report(name, data):
    """draw_NAME of lib/report/figures.py, here."""
    figure = plt.figure()
    getattr(importlib.import_module("lib.report.figures"), f"draw_{name}")(figure, data)
    figure.axes[0].legend()
    plt.show()
