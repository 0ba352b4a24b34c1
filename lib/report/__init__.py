"""Room: the report of stage 4, how far apart a model holds two groups of prompts, and learning curves.

    write_report(out, results, completions)    report.html, report.md and figures: what stage 4 measured
    separations(victim, groups, safe)          inside a model: harmful against safe prompts (paper, Figure 4)
    draw_curves(metrics_path, png_path)        what stages 2 and 3 have logged, as small panels

Skip it at first: the numbers come from lib/metrics.py, and here they are only shown: sections.py is what the
report says, page.html and page.py how it looks, figures.py what is drawn, where matplotlib is installed.
separation.py is worth a visit: a support vector machine from scratch. Tests: tests/test_report.py,
tests/test_separation.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lib.report.figures import draw_curves, draw_figures
from lib.report.page import as_page, as_text, deciding_lines
from lib.report.sections import sections
from lib.report.separation import separations
from lib.run.files import write_text

__all__ = ["draw_curves", "separations", "write_report"]


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
    lines = deciding_lines(completions, results["config"]["harm_threshold"])
    write_text(out / "report.html", as_page(found, out, lines))
