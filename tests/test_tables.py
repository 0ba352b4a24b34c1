"""The tables of README and docs: each number comes from docs/results, and findings follow from intervals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lib import UserError
from lib.compare import study, tables
from lib.compare.studies import FINDINGS, STUDIES, TABLES

ROOT = Path(__file__).parents[1]


def test_pages_are_what_write_docs_makes_of_the_results_that_are_kept():
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page}: python -m lib.compare.study --write-docs"
    files = list((ROOT / "docs/results").glob("*.json"))
    assert {path.stem for path in files} <= STUDIES.keys()
    assert sum(path.stat().st_size for path in files) <= 300_000


def test_tables_and_claims_name_models_that_their_study_has():
    known = {}
    for name, chosen in STUDIES.items():
        models, claims = chosen.runs.keys() | chosen.curves.keys() | {"base"}, chosen.claims
        assert {claim.ours for claim in claims} | {claim.other for claim in claims} <= models | {""}
        known[name] = models | {claim.key[0] for claim in claims}
    for name, (study_, models, figures) in TABLES.items():
        assert {*models} <= known[study_], name
        assert models or {figure.partition(": ")[0] for figure in figures.values()} <= known[study_]
    assert FINDINGS.keys() == {claim.finding for chosen in STUDIES.values() for claim in chosen.claims} - {""}


def make_root(root: Path, results: str, readme: str) -> Path:
    (root / "docs/results").mkdir(parents=True)
    (root / "docs/results.md").write_text(results)
    (root / "README.md").write_text(readme)
    return root


def keep(root: Path, name: str, figures: dict[tuple[str, str], list[float]]) -> None:
    """As a study writes it, and a person copies it."""
    seeds = [dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)]
    numbers = [STUDIES[name].first_seed + i for i in range(len(seeds))]
    about = {"command": f"python -m lib.compare.study {name}", "seeds": numbers, "date": "2026-11-27"}
    study.write(name, replace(STUDIES[name], curves={}), root, seeds, about | {"hardware": "2 CPU cores"})
    shutil.move(root / f"{name}.json", root / "docs/results")


def test_write_docs_fills_in_tables_between_their_marks_and_touches_nothing_else(tmp_path, monkeypatch):
    readme = "# TARS\n\nBefore.\n\n<!-- table main: -->\nold | 0.99 |\n<!-- end -->\n\nBehind, by hand: 12.\n"
    pages = make_root(tmp_path, "<!-- table each-seed: -->\n<!-- end -->\n", readme)
    monkeypatch.setattr(study, "pages", lambda: tables.pages(pages))
    monkeypatch.setattr("sys.argv", ["study", "--write-docs"])
    with pytest.raises(UserError, match=r"no docs/results/seeds.json.*copy runs/seeds/seeds.json there"):
        study.main()
    of_tars = [figure.partition(": ")[2] for figure in TABLES["each-seed"][2].values()]
    figures = {("tars", figure): [0.9, 1.0, 1.0] for figure in of_tars}
    figures |= {("sft", "dsr/plain_or_gcg"): [0.2, 0.3, 0.4]}
    figures |= {(f"tars - {other}", "dsr/plain_or_gcg"): [0.25, 0.5, 0.75] for other in ("sft", "rl-direct")}
    keep(pages, "seeds", figures)
    study.main()
    text, seeds = (pages / "README.md").read_text(), (pages / "docs/results.md").read_text()
    assert text.startswith("# TARS\n\nBefore.\n\n<!-- table main: python -m lib.compare.study seeds -->\n")
    assert text.endswith("|\n<!-- end -->\n\nBehind, by hand: 12.\n") and "old" not in text
    assert "`python -m lib.compare.study seeds`, seeds 72 to 74, 2026-11-27, 2 CPU cores. Mean [" in text
    # 4.303 * 0.0577 / sqrt(3) = 0.143 on either side of 0.967
    assert "| DSR, direct requests | 0.97 [0.82, 1.11]; 0.90 |" in text.replace(" - |", "")
    assert "0.30 [0.05, 0.55]; 0.20" in text
    assert seeds.count("0.90") == len(figures) - 3 and "+0.50" in seeds and "seed 73" in seeds
    study.main()
    assert (pages / "README.md").read_text() == text


def test_a_findings_verdict_follows_from_its_intervals(tmp_path):
    """F6: compliance with ambiguous prompts is higher, DSR is equal. F1: what is missing is not judged."""
    root = make_root(tmp_path, "<!-- table findings: -->\n<!-- end -->\n", "")
    up, down = [0.1, 0.11, 0.1, 0.11, 0.1], [-0.1, -0.11, -0.1, -0.11, -0.1]
    figures = {
        ("tars-0.5 - plain-only", "DSR"): [0.01, 0.0, -0.01, 0.0, 0.0],  # as good as equal
        ("tars-0.5 - plain-only", "compliance/ambiguous"): [0.2, 0.3, 0.2, 0.3, 0.2],
        ("harmful-only - tars-0.5", "compliance/ambiguous"): [0.1, -0.3, 0.2, 0.3, 0.2],  # either way
        ("heavy - tars", "area, plane/task_score"): up,
        ("heavy - tars", "area, plane/compliance"): down,
        ("tars - one-reward", "area, plane/task_score"): down,
    }
    keep(root, "ablations", figures)
    text = tables.pages(root)[root / "docs/results.md"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| F")]
    verdicts = {row[0]: row[-1] for row in rows}
    found = [verdicts[f"F{number}"].strip("|* ") for number in (1, 4, 5, 6, 7)]
    assert found == ["not run", "open", "in part", "reproduced", "not reproduced"]
    assert "| tars-0.5 - plain-only: compliance/ambiguous > 0 | +0.24 [+0.17, +0.31] | yes |" in text
    assert "study ablations -->" in text
